"""tsdkd doctor: a line or a JSON object for each finding, an exit code, and no file."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.helpers.commands import refuse
from tests.helpers.prompts import write_prompts
from tests.helpers.scored_runs import scored_run
from tsdkd.cli import app
from tsdkd.cli.doctor import _plan_findings
from tsdkd.stages.plan.estimates import Estimate
from tsdkd.stages.plan.rates import Rates

OPTIONS = ("--sample", "3", "--max-new-tokens", "5", "--max-prompt-tokens", "200")


@pytest.fixture(autouse=True)
def empty_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tsdkd.stages.plan.rates.measure_rates", lambda: Rates("cpu", "float32", 1e9, 1e9))
    monkeypatch.chdir(tmp_path)


def examine(*words: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    result = CliRunner().invoke(app, ["doctor", *OPTIONS, *map(str, words)])
    return result.exit_code, result.stdout, result.stderr


def test_findings_are_lines_and_nothing_is_written(student: Path, teacher: Path, rows: Path, tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl", 4)
    places = (tmp_path, student, teacher, rows)
    before = [sorted((f, f.stat().st_mtime_ns) for f in place.rglob("*")) for place in places]
    arguments = ("--student", student, "--teacher", teacher, "--prompts", prompts, "--benchmarks", rows)
    code, stdout, _ = examine(*arguments)
    assert code == 0
    *lines, counts = stdout.splitlines()
    assert all(line.split()[0] in {"ok", "look"} for line in lines)
    assert [line.split()[1] for line in lines[-3:]] == ["disk", "memory", "time"]
    assert counts.endswith(" 0 stop")
    assert [sorted((f, f.stat().st_mtime_ns) for f in place.rglob("*")) for place in places] == before


def test_json_has_stable_keys_and_a_stop_exits_with_2(student: Path, other_family: Path, tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl", 4)
    code, stdout, _ = examine("--student", student, "--teacher", other_family, "--prompts", prompts, "--json")
    findings = json.loads(stdout)
    assert code == 2
    assert all(list(finding) == ["name", "status", "reason", "remedy", "values"] for finding in findings)
    assert [finding["name"] for finding in findings if finding["status"] == "stop"] == ["tokenizer"]


def test_json_keeps_any_text_on_any_terminal(student: Path, teacher: Path, tmp_path: Path) -> None:
    """Control characters, a lone surrogate, and a character that Latin-1 has no escape of JSON for."""
    text = "What is 3 times 3? \x1b[31m \u202e \x9b \ud800 \U0001f600"
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "test.jsonl").write_text(json.dumps({"question": text}) + "\n")
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": text.replace("\ud800", "d800")}) + "\n")
    words = ("--student", student, "--teacher", teacher, "--prompts", "prompts.jsonl", "--benchmarks", tmp_path)
    code, stdout, _ = examine(*words, "--json")
    found = {f["name"]: f for f in json.loads(stdout)}
    assert (code, stdout.isascii()) == (0, True)
    assert [overlap["question"] for overlap in found["benchmarks"]["values"]["overlaps"]] == [text]


def test_options_of_the_run_reach_the_findings(student: Path, teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "options.yaml").write_text("learning-rate: 1e-4\nk: 3\n")
    words = ("--student", student, "--teacher", teacher, "--config", "options.yaml", "--json")
    found = {f["name"]: f for f in json.loads(examine(*words)[1])}
    assert found["entropy_term"]["values"]["learning_rate"] == 1e-4
    assert "harms this pair" in found["entropy_term"]["reason"]  # not only below the study's learning rates
    assert "3 candidates" in found["topk_agreement"]["reason"]


@pytest.mark.parametrize(
    ("stage", "option"), [("generate", "--memory-fraction"), ("score", "--batch-tokens"), ("train", "--lora")]
)
def test_memory_that_does_not_fit_names_options_of_the_command_that_needs_most(
    stage: str, option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tsdkd.stages.models.device.available_memory", lambda _: 10)
    estimates = {name: Estimate("", 1.0, 1, 100 if name == stage else 1) for name in ("generate", "score", "train")}
    memory = next(finding for finding in _plan_findings(estimates) if finding.name == "memory")
    assert memory.status == "look"
    options = {word.strip(":,.") for word in memory.remedy.split() if word.startswith("--")}
    assert option in options
    help_page = CliRunner().invoke(app, [stage, "--help"], env={"COLUMNS": "200"}).output
    assert all(option in help_page for option in options)


def test_wrong_options_are_refused() -> None:
    assert "k is 1" in refuse("doctor", "--k", "1")[0] or "--k" in refuse("doctor", "--k", "1")[0]
    assert "opener" in refuse("doctor", "--opener", "2")[0]


def test_a_run_is_checked_in_place_of_a_pair(student: Path, teacher: Path, tmp_path: Path) -> None:
    run = scored_run(tmp_path, student, teacher)
    code, stdout, _ = examine("--run", run)
    assert (code, [line.split()[:2] for line in stdout.splitlines()[:-1]]) == (
        0,
        [["ok", "sampler"], ["ok", "staleness"], ["look", "start"]],
    )
    code, stdout, _ = examine("--run", run, "--student", teacher, "--json")
    found = {f["name"]: f for f in json.loads(stdout)}
    assert (code, found["staleness"]["status"]) == (0, "look")
    assert set(found["staleness"]["values"]) == {"candidate_overlap", "drift"}
    assert examine("--run", tmp_path / "none")[0] == 2
    cause, _ = refuse("doctor", "--run", str(run), "--teacher", str(teacher), "--prompts", "p.jsonl")
    assert cause.endswith("does not read --teacher and --prompts.")
