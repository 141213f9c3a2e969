"""Output of the commands, and models and paths that pass from one stage to the next."""

import io
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from rich.text import Text
from typer.testing import CliRunner

from tests.helpers.commands import run
from tests.helpers.prompts import write_prompts
from tsdkd.artifacts.manifest import Manifest, ModelRecord, load_manifest
from tsdkd.cli import app, console
from tsdkd.cli.console import ConsoleObserver
from tsdkd.cli.train import _summary
from tsdkd.core import TSDKDConfig
from tsdkd.stages.config.train import TrainConfig


@pytest.fixture
def rollouts(student: Path, tmp_path: Path) -> Path:
    prompts = write_prompts(tmp_path / "prompts.jsonl", 4)
    run("generate", "--run", tmp_path / "run", "--prompts", prompts, "--student", student, "--max-new-tokens", 5)
    return tmp_path / "run" / "rollouts"


def test_models_flow_along_the_chain(rollouts: Path, student: Path, teacher: Path) -> None:
    """A student that generate names is scored and trained; the teacher of the scores is recorded."""
    directory = rollouts.parent
    shown = run("score", "--run", directory, "--teacher", teacher)
    assert "next: tsdkd train" in shown
    shown = run("train", "--run", directory, "--batch-size", 2, "--epochs", 1)
    assert "next: tsdkd eval" in shown
    manifest = load_manifest(directory / "checkpoint")
    assert {model.role: model.name for model in manifest.models} == {"student": str(student), "teacher": str(teacher)}


def test_online_training_with_an_adapter_and_a_second_round(student: Path, teacher: Path, tmp_path: Path) -> None:
    """No rollouts and no scores; the adapter is a student like any other to generate, score and eval's parents."""
    prompts = write_prompts(tmp_path / "p.jsonl", 6)
    online = ["--prompts", prompts, "--teacher", teacher, "--max-new-tokens", 5, "--max-prompt-tokens", 64]
    shape = ["--k", 4, "--batch-size", 2, "--epochs", 1, "--precision", "float32", "--engine", "transformers"]
    shown = run("train", "--run", tmp_path, "--student", student, "--lora", *online, *shape)
    assert "teacher (online)" in shown
    assert "Memory needed for training" in shown
    manifest = load_manifest(tmp_path / "checkpoint")
    assert manifest.config["online"]["sampling"]["max_new_tokens"] == 5
    assert manifest.config["lora"]["targets"] == "all-linear"
    assert [parent.kind for parent in manifest.parents] == ["prompts"]
    second = tmp_path / "second"
    run("generate", "--run", second, "--student", tmp_path / "checkpoint", "--prompts", prompts, "--max-new-tokens", 4)
    run("score", "--run", second, "--teacher", teacher, "--k", 4)
    assert load_manifest(second / "scores").model("student").name == str(tmp_path / "checkpoint")


def test_the_run_directory_comes_from_the_environment(
    rollouts: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TSDKD_RUN", str(rollouts.parent))
    run("score", "--teacher", teacher)
    assert (rollouts.parent / "scores" / "manifest.json").is_file()


def test_off_policy_rollouts_are_the_teachers(student: Path, teacher: Path, tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "p.jsonl", 2)
    run(
        "generate",
        "--run",
        tmp_path,
        "--policy",
        "teacher",
        "--teacher",
        teacher,
        "--prompts",
        prompts,
        "--max-new-tokens",
        4,
    )
    (model,) = load_manifest(tmp_path / "rollouts").models
    assert (model.role, model.name) == ("teacher", str(teacher))
    run("score", "--run", tmp_path, "--student", student)  # the teacher is the one that answered
    assert load_manifest(tmp_path / "scores").model("teacher").name == str(teacher)


def test_rollouts_of_two_authors_flow_on(student: Path, teacher: Path, tmp_path: Path) -> None:
    """Both models are recorded, so score needs no names; MiniLLM trains on a mixture, offline and online."""
    prompts = write_prompts(tmp_path / "p.jsonl", 6)
    for policy in ("mixed", "speculative", "teacher-mixed"):
        directory = tmp_path / policy
        shown = run(
            *("generate", "--run", directory, "--policy", policy, "--student", student, "--teacher", teacher),
            *("--prompts", prompts, "--max-new-tokens", 4, "--accept-k", 3, "--lambda", 0.5),
        )
        assert "by the teacher" in shown
        run("score", "--run", directory)
        manifest = load_manifest(directory / "scores")
        assert {m.role: m.name for m in manifest.models} == {"student": str(student), "teacher": str(teacher)}
    assert load_manifest(tmp_path / "mixed" / "rollouts").config["student_fraction"] == 0.5
    train = ("train", "--method", "minillm", "--epochs", 1, "--batch-size", 6)
    assert "policy gradient (weight 1)" in run(*train, "--run", directory)
    options = ("--student", student, "--teacher", teacher, "--prompts", prompts, "--max-new-tokens", 4)
    for fraction, more in ((0.2, []), (0.5, ["--teacher-fraction", 0.5]), (None, ["--teacher-fraction", 0])):
        run(*train, *options, *more, "--overwrite", "--run", tmp_path / "online")
        sampling = load_manifest(tmp_path / "online" / "checkpoint").config["online"]["sampling"]
        assert sampling["policy"] == ("teacher-mixed" if fraction else "student")
        assert fraction in {None, sampling["teacher_fraction"]}


def test_lineage_names_a_dataset(student: Path, tmp_path: Path) -> None:
    directory = tmp_path / "data"
    directory.mkdir()
    write_prompts(directory / "train.jsonl", 3)
    shown = run(
        *("generate", "--run", tmp_path / "run", "--prompts", directory, "--student", student),
        *("--max-new-tokens", 3, "--limit", 2),
    )
    assert "2 (skipped: none)" in shown
    tree = run("artifact", "lineage", tmp_path / "run" / "rollouts")
    assert "dataset" in tree
    assert "missing" not in tree
    assert "unchanged" in run("artifact", "verify", tmp_path / "run" / "rollouts")


def test_artifact_commands(rollouts: Path, teacher: Path, student: Path) -> None:
    run("score", "--run", rollouts.parent, "--teacher", teacher)
    scores = rollouts.parent / "scores"
    assert "scores unchanged" in run("artifact", "verify", scores)
    shown = run("artifact", "show", scores)
    assert "scores, complete" in shown
    assert load_manifest(scores).fingerprint[:40] in shown
    tree = run("artifact", "lineage", scores)
    for part in ("scores", "rollouts", "prompts", "student", "teacher"):
        assert part in tree
    (rollouts.parent / ".." / "prompts.jsonl").resolve().unlink()
    assert "missing" in run("artifact", "lineage", scores)


def test_lineage_goes_on_through_a_model_that_is_an_artifact(teacher: Path, tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "p.jsonl", 2)
    student = tmp_path / "small"
    run("prune", "--output", student, "--teacher", teacher, "--prompts", prompts)
    run(
        *("generate", "--run", tmp_path / "run", "--prompts", prompts, "--student", student),
        *("--max-new-tokens", 3),
    )
    tree = run("artifact", "lineage", tmp_path / "run" / "rollouts")
    assert load_manifest(student).model("teacher").weights[:12] in tree


def test_lineage_of_a_second_round_ends(rollouts: Path, student: Path, teacher: Path, tmp_path: Path) -> None:
    """The checkpoint responds to the prompts and replaces the rollouts that it was made from."""
    directory = rollouts.parent
    run("score", "--run", directory, "--teacher", teacher)
    run("train", "--run", directory, "--epochs", 1)
    again = ("generate", "--run", directory, "--prompts", tmp_path / "prompts.jsonl", "--max-new-tokens", 5)
    run(*again, "--student", directory / "checkpoint", "--overwrite", "--seed", 1)
    tree = run("artifact", "lineage", rollouts)
    assert "changed since" in tree
    assert tree.count("scores") == 2  # the kind and the directory's name


def test_the_next_command_names_paths_as_a_shell_reads_them(student: Path, tmp_path: Path) -> None:
    directory = tmp_path / "a run; with $(words) and 'quotes'"
    prompts = write_prompts(tmp_path / "prompts.jsonl", 2)
    shown = run("generate", "--run", directory, "--prompts", prompts, "--student", student, "--max-new-tokens", 2)
    (command,) = [line.removeprefix("next: ") for line in shown.splitlines() if line.startswith("next: ")]
    assert shlex.split(command) == ["tsdkd", "score", "--run", str(directory)]


def test_the_next_command_asks_for_a_student_where_the_rollouts_record_none(student: Path, tmp_path: Path) -> None:
    alone = ("--policy", "teacher", "--teacher", student, "--max-new-tokens", 2)
    prompts = write_prompts(tmp_path / "prompts.jsonl", 2)
    shown = run("generate", "--run", tmp_path, "--prompts", prompts, *alone)
    assert f"next: tsdkd score --run {tmp_path} --student MODEL" in shown


@pytest.mark.parametrize("terminal", [True, False])
def test_a_path_stays_on_one_line(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    screen, path = io.StringIO(), "/" + "/".join(["directory"] * 30)
    monkeypatch.setattr(console, "out", Console(file=screen, force_terminal=terminal, no_color=True, width=80))
    console.show_pairs("checkpoint", [("path", path), ("responses", "one\ntwo")])
    lines = [Text.from_ansi(line).plain for line in screen.getvalue().splitlines()]
    assert lines == ["checkpoint", f"  path       {path}", "  responses  one", "             two"]


def test_piped_tables_are_not_cut(tmp_path: Path) -> None:
    path = "/" + "/".join(["directory"] * 30)
    script = f"from tsdkd.cli.console import show_table; show_table('t', ['a', 'b'], [[{path!r}, 'x']])"
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert any(path in line and line.rstrip().endswith("x") for line in shown.stdout.splitlines())


@pytest.mark.parametrize("command", ["generate", "score", "train", "eval", "inspect", "prune"])
def test_help_cuts_no_option_on_80_columns(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = run(command, "--help")
    assert "--run" in shown or "--output" in shown
    assert "…" not in shown


def test_a_log_gets_a_line_a_minute(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = iter([0.0, 20.0, 60.0, 80.0, 120.0, 200.0])  # the start, then each advance
    monkeypatch.setattr("tsdkd.cli.progress.time.monotonic", lambda: next(clock))
    with ConsoleObserver().progress("sampling", 40, "responses", done=10) as advance:
        for _ in range(5):
            advance(6)
    assert capsys.readouterr().err.splitlines() == [
        "sampling: 22 of 40 responses, 12.0 a minute, 2 min left",
        "sampling: 34 of 40 responses, 12.0 a minute, 0 min left",
    ]


def test_options_of_the_objective_reach_the_manifest_and_default_to_the_papers(rollouts: Path, teacher: Path) -> None:
    directory = rollouts.parent
    run("score", "--run", directory, "--teacher", teacher)
    run("train", "--run", directory, "--epochs", 1)
    from dataclasses import asdict

    found = load_manifest(directory / "checkpoint").config
    assert found["objective"] | {"released": ()} == asdict(TSDKDConfig())
    assert (found["learning_rate"], found["batch_size"], found["warmup_ratio"], found["schedule"]) == (
        5e-6,
        128,
        0.1,
        "cosine",
    )
    changed = [
        "--alpha",
        0,
        "--beta",
        0.5,
        "--no-gate",
        "--opener",
        "adaptive",
        "--em-weight",
        0.2,
        "--indirect-reduction",
        "sum",
    ]
    run("train", "--run", directory, "--epochs", 1, "--checkpoint", directory / "other", *changed)
    objective = load_manifest(directory / "other").config["objective"]
    assert objective | {"released": ()} == asdict(
        TSDKDConfig(alpha=0, beta=0.5, gate=False, opener="adaptive", em_weight=0.2, indirect_reduction="sum")
    )


def test_a_method_with_some_of_its_options(rollouts: Path, teacher: Path) -> None:
    directory = rollouts.parent
    run("score", "--run", directory, "--teacher", teacher)
    for name, more, changed in (
        ("gkd", ["--beta", 0.1], {"beta": 0.1}),
        ("gkd", [], {"beta": 0.5}),
        ("tsdkd", ["--released", "entropy,ranking", "--k", 4], {"released": ["ranking", "entropy"], "k": 4}),
        ("tsdkd-released", [], {"released": ["ranking", "opener", "entropy"]}),
    ):
        shown = run("train", "--run", directory, "--epochs", 1, "--method", name, *more, "--overwrite")
        assert name in shown
        found = load_manifest(directory / "checkpoint").config
        assert found["method"] == name
        assert found["objective"] | changed == found["objective"]


def test_responses_of_the_teacher_need_no_scores(student: Path, teacher: Path, tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "p.jsonl", 3)
    options = ["--prompts", prompts, "--teacher", teacher, "--policy", "teacher", "--max-new-tokens", 4]
    run("generate", "--run", tmp_path, *options)
    shown = run("train", "--run", tmp_path, "--method", "seqkd", "--student", student, "--epochs", 1)
    assert "teacher (absent)" in shown
    assert not (tmp_path / "scores").exists()
    assert load_manifest(tmp_path / "checkpoint").model("teacher").name == str(teacher)


def test_piped_output_is_quiet(rollouts: Path, teacher: Path) -> None:
    """stderr holds no bars and no messages of libraries."""
    command = [sys.executable, "-m", "tsdkd", "score", "--run", str(rollouts.parent), "--teacher", str(teacher)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"COLUMNS": "200"})
    assert done.stderr == ""
    assert "Cost of scoring" in done.stdout


def test_a_complete_artifact_is_skipped(rollouts: Path, student: Path, tmp_path: Path) -> None:
    command = ["generate", "--run", str(rollouts.parent), "--prompts", str(tmp_path / "prompts.jsonl")]
    result = CliRunner().invoke(app, [*command, "--student", str(student), "--max-new-tokens", "5"])
    assert "is complete: nothing to do" in result.stderr


def test_version() -> None:
    assert run("--version").startswith("tsdkd 0.")


def test_a_closed_pipe_is_no_error() -> None:
    command = [sys.executable, "-m", "tsdkd", "train", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        assert process.stderr.read() == ""


@pytest.mark.parametrize(
    ("policy", "overlap", "drift", "is_stale"),
    [
        ("student", 0.95, 0.01, False),
        ("student", 0.7, 0.4, True),
        ("speculative", 0.7, 0.4, True),
        ("teacher", 0.7, -1.0, False),
        ("given", 0.7, -1.0, False),
    ],
)
def test_the_summary_of_training_shows_if_scores_are_stale_by_now(
    policy: str, overlap: float, drift: float, is_stale: bool
) -> None:
    """Responses without the student's part do not become stale with it."""
    student = ModelRecord("student", "s", "w", "t", "c")
    measured = {"candidate_overlap": overlap, "drift": drift}
    summary = {"steps": 1} | {f"{name}_{at}": value for name, value in measured.items() for at in ("first", "last")}
    config = {"precision": "float32", "objective": {}, "method": "tsdkd"}
    manifest = Manifest("checkpoint", config, 0, models=(student,), summary=summary)
    rows = dict(_summary(TrainConfig(), manifest, Manifest("rollouts", {"policy": policy}, 0)))
    assert rows["drift"] == f"{drift:.3f} -> {drift:.3f}"
    assert ("stale by now" in rows.get("scores", "")) == is_stale
