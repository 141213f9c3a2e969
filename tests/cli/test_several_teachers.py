"""Several teachers on the command line: `--teacher NAME=MODEL --teacher-by COLUMN`."""

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from tests.helpers.commands import refuse, run
from tsdkd.artifacts.files import CONFIG_FILE, JOURNAL_FILE
from tsdkd.artifacts.manifest import load_manifest
from tsdkd.cli import defaults
from tsdkd.cli.eval import _run_models, parse_models
from tsdkd.cli.options import parse_teachers
from tsdkd.errors import InputError
from tsdkd.stages.report.commands import rebuild_command
from tsdkd.stages.report.runs import load_runs

SAMPLING = ("--max-new-tokens", 4, "--limit", 4)


@pytest.fixture(scope="module")
def fields(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [{"prompt": f"What is {i}?", "field": ("code/py", "math")[i % 2]} for i in range(4)]
    file = tmp_path_factory.mktemp("fields") / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def models(student: Path, teacher: Path) -> tuple[object, ...]:
    return "--student", student, "--teacher", f"math={teacher}", "--teacher", f"code/py={student}"


@pytest.fixture(scope="module")
def sampled(models: tuple[object, ...], fields: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with rollouts."""
    first = tmp_path_factory.mktemp("sampled")
    by_field = "--teacher-by", "field", "--prompts", fields, "--policy", "mixed"
    assert "teacher code/py" in run("generate", "--run", first, *models, *by_field, *SAMPLING)
    return first


def test_a_recorded_configuration_and_a_rebuilt_command_repeat_the_run(sampled: Path) -> None:
    """Other settings than those of the rollouts would be refused."""
    first, output = sampled, ("--rollouts", sampled / "rollouts")
    made = load_manifest(first / "rollouts").fingerprint
    run("generate", "--config", first / "rollouts" / CONFIG_FILE, *output)
    (first / "rollouts" / JOURNAL_FILE).unlink()
    (recorded,) = load_runs([first])
    command = shlex.split(rebuild_command(recorded, recorded.artifacts[0]))
    run(*command[1:], *output)
    assert load_manifest(first / "rollouts").fingerprint == made
    run("report", first)
    page = (first / "report.html").read_text()
    assert "Responses by teacher" in page
    assert "(code/py)" in page


def test_teachers_without_names_or_column_are_refused(
    models: tuple[object, ...], student: Path, fields: Path, tmp_path: Path
) -> None:
    generate = ("generate", "--run", tmp_path, "--prompts", fields)
    cause, remedy = refuse(*generate, *models)
    assert cause == "Several teachers are given, and no column names the teacher of each prompt."
    assert "--teacher-by COLUMN" in remedy
    by_field = (*generate, "--student", student, "--teacher-by", "field")
    cause, remedy = refuse(*by_field, "--teacher", student)
    assert "is not NAME=MODEL" in cause
    cause, remedy = refuse(*by_field, "--policy", "mixed")
    assert cause == "The column 'field' names the teacher of each prompt, and no teacher has a name."
    cause, remedy = refuse(*by_field, "--teacher", f"math={student}")
    assert f"{fields}, line 1: the column 'field' names the teacher 'code/py'; the teachers are math." in cause
    assert "--teacher code/py=MODEL" in remedy
    cause, _ = refuse(*by_field, "--teacher", f"math={student}", "--policy", "given")
    assert cause == f"The policy 'given' does not use the teacher math={student}."
    assert not [path for path in tmp_path.iterdir() if path.name == "rollouts"]


def test_values_of_teachers() -> None:
    assert parse_teachers("--teacher", ["b=2=3", "a c=1"], "field") == {"a c": "1", "b": "2=3"}
    assert parse_teachers("--teacher", ["b=2"], "field") == {"b": "2"}
    assert parse_teachers("--teacher", ["b=2"], None) == {"": "b=2"}
    assert parse_teachers("--teacher", None, "field") == {}
    for values in (["=1"], ["a="], ["a"], ["a\n=1"], ["a" * 41 + "=1"], ["a=1", "a=2"], ["a", "b"]):
        with pytest.raises(InputError):
            parse_teachers("--teacher", values, "field")


def test_recorded_teachers_are_the_default(sampled: Path, student: Path, teacher: Path) -> None:
    """`recorded` rollouts name their teachers, with or without the models."""
    pair = {"code/py": str(student), "math": str(teacher)}
    values = [f"{name}={model}" for name, model in pair.items()]
    named = load_manifest(sampled / "rollouts")
    alone = replace(named, models=named.models[:1])
    assert defaults.teachers(None, None, named) == pair
    assert defaults.teachers([f"math={student}"], None, named) == {"math": str(student)}
    assert defaults.teachers(values, None, alone) == pair
    with pytest.raises(InputError, match="'field' names the teacher"):
        defaults.teachers(None, None, alone)


def test_eval_measures_every_teacher(
    models: tuple[object, ...], student: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their results have names that a directory may have, and that --also takes."""
    from tests.helpers.runs import STUDENT, checkpoint, log, rollouts, scores
    from tsdkd.artifacts.manifest import ModelRecord

    several = [ModelRecord(f"teacher:{name}", f"models/{name[0]}", "b" * 64, "t", "c") for name in ("a/b%", "c d")]
    monkeypatch.setattr("tests.helpers.runs.TEACHER", several[0])
    rollouts(tmp_path)
    scores(tmp_path)
    checkpoint(tmp_path, 0, log(2))
    found = _run_models(tmp_path / "checkpoint")
    path = str(tmp_path / "checkpoint")
    assert found == {"teacher-a%2Fb%25": "models/a", "student": STUDENT.name, "distilled": path}
    assert parse_models("--also", [f"{name}={model}" for name, model in found.items()]) == found


def test_a_chain_of_commands_tells_the_teachers_apart(
    models: tuple[object, ...], fields: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores, training, results and the report, by teacher; plan reads the artifacts."""
    monkeypatch.chdir(tmp_path)
    run("generate", *models, "--teacher-by", "field", "--prompts", fields, "--max-new-tokens", 6)
    run("score", "--k", 4)
    shape = ("--k", 4, "--epochs", 1, "--batch-size", 2, "--precision", "float32", "--eval-steps", 1)
    run("train", *shape, "--held-out", 0.5)
    card = (tmp_path / "runs" / "default" / "checkpoint" / "README.md").read_text()
    assert "# student, distilled from student and teacher\n" in card
    assert "| teacher:code/py | " in card
    held_out = ("--held-out", "runs/default", "--tasks", "embedded", "--limit", 1)
    run("eval", *held_out, "--no-chat")
    results = sorted(path.name for path in (tmp_path / "runs" / "default" / "results").iterdir())
    assert results == ["distilled", "student", "teacher-code%2Fpy", "teacher-math"]
    run("report", "runs/default")
    page = (tmp_path / "runs" / "default" / "report.html").read_text()
    for text in ("Responses by teacher", "teacher entropy", "by teacher</figcaption>", "held-out responses by teacher"):
        assert text in page
    assert "teacher" in run("doctor", "--run", "runs/default")
    (tmp_path / "plan").write_text("tsdkd score --overwrite\ntsdkd eval --overwrite --tasks gsm8k\n")
    planned = run("plan", "plan")
    assert "teacher-math" in planned
