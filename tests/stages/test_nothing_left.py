"""A command that fails leaves no new file, and checks all its options before it writes."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.helpers.commands import refuse
from tests.helpers.prompts import write_prompts
from tests.helpers.training import CONFIG, learn
from tsdkd.artifacts.reader import read_artifact
from tsdkd.artifacts.writer import Writer
from tsdkd.errors import InputError
from tsdkd.stages.eval import harness

Contents = Callable[[Path], dict[str, bytes]]


def refused(*_: object, **__: object) -> None:
    raise InputError("refused", "Choose another.")


@pytest.mark.parametrize(
    ("command", "function"),
    [
        ("generate", "generate.sampling.check_engine"),
        ("score", "score.loop.Scoring._score_teacher"),
        ("score", "score.loop.Scoring._report_cost"),
        ("train", "train.loop._require_memory"),
        ("train", "train.loop.DistillationTrainer.get_batch_samples"),
        ("train", "train.stage.samples_from_prompts"),
        ("eval", "eval.harness.load_tasks"),
        ("eval", "eval.harness.run_benchmark"),
        ("prune", "prune._drop_layers"),
    ],
)
def test_a_stage_that_fails_leaves_no_directory(
    run: Path,
    student: Path,
    teacher: Path,
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    function: str,
) -> None:
    """Not even the run directory, where the stage made it."""
    prompts = write_prompts(tmp_path / "prompts.jsonl", 4)
    monkeypatch.setattr(f"tsdkd.stages.{function}", refused)
    options = {
        "generate": ["--student", student, "--prompts", prompts, "--max-new-tokens", 4],
        "score": ["--rollouts", run / "rollouts", "--teacher", teacher],
        "train": ["--rollouts", run / "rollouts", "--scores", run / "scores", "--k", 4],
        "eval": ["--model", f"m={student}", "--tasks", "gsm8k", "--data", rows, "--max-new-tokens", 4],
        "prune": ["--teacher", teacher, "--prompts", prompts, "--drop", 1, "--output", tmp_path / "new" / "run" / "p"],
    }[command]
    if function.endswith("samples_from_prompts"):
        options = ["--prompts", prompts, "--student", student, "--teacher", teacher, "--lambda", 1]
    options += [] if command == "prune" else ["--run", tmp_path / "new" / "run"]
    assert refuse(command, *options)[0] == "refused"
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.jsonl"]


@pytest.mark.parametrize("way", ["no template", "baseline", "missing model", "no prerequisites", "other settings"])
def test_eval_checks_every_model_before_it_measures_one(
    student: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setattr(harness, "run_benchmark", lambda *_: pytest.fail("a benchmark was run"))
    other = shutil.copytree(student, tmp_path / "other")
    words: list[object] = ["--tasks", "gsm8k", "--data", rows]
    if way == "no template":
        tokenizer = AutoTokenizer.from_pretrained(student)
        tokenizer.chat_template = None
        shutil.rmtree(other)
        shutil.copytree(student, other, ignore=shutil.ignore_patterns("chat_template*", "tokenizer*"))
        tokenizer.save_pretrained(other)
        words += ["--chat"]
    elif way == "baseline":
        words += ["--baseline", "nobody"]
    elif way == "missing model":
        shutil.rmtree(other)
    elif way == "no prerequisites":
        words = ["--tasks", "gsm8k,mbpp", "--data", rows]
    else:
        monkeypatch.setattr("tsdkd.stages.eval.stage.require_same_settings", refused)
        monkeypatch.setattr("tsdkd.stages.eval.stage.previous_results", lambda path: path.name == "b")
    refuse("eval", "--model", f"a={student}", "--model", f"b={other}", *words, "--results", tmp_path / "results")
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("name", [".", "..", ".hidden", "a\x1b[2J", "a\nb", "a" * 61, "a/b", ""])
def test_an_invalid_name_is_refused(student: Path, name: str, tmp_path: Path) -> None:
    for option in ("--model", "--also"):
        cause, _ = refuse("eval", option, f"{name}={student}", "--model", f"b={student}", "--results", tmp_path / "r")
        assert "is not NAME=MODEL" in cause
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("command", ["inspect", "report"])
@pytest.mark.parametrize("way", ["long name", "read-only"])
def test_a_page_that_cannot_be_written_is_refused_before_anything_is_read(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, way: str
) -> None:
    def read_only(path: Path) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr("tsdkd.stages.inspect.stage.inspect_scores", lambda *_: pytest.fail("scores were read"))
    monkeypatch.setattr("tsdkd.stages.report.stage.report", lambda *_: pytest.fail("runs were read"))
    if way == "read-only":
        monkeypatch.setattr(Path, "touch", read_only)
    name = "page.html" if way == "read-only" else "p" * 260 + ".html"
    cause, remedy = refuse(command, *(["--run"] if command == "inspect" else []), run, "--html", tmp_path / name)
    assert "cannot be written" in cause
    assert "--html" in remedy
    assert list(tmp_path.iterdir()) == []


def test_a_kill_between_the_finish_and_the_cleaning(
    run: Path, student: Path, tmp_path: Path, contents: Contents
) -> None:
    """The next command that reads the checkpoint deletes its saved steps; so does the same command."""
    learn(run, student, tmp_path / "whole")
    if (child := os.fork()) == 0:
        finish = Writer.finish
        Writer.finish = lambda *arguments: (finish(*arguments), os._exit(9))
        try:
            learn(run, student, tmp_path / "read")
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 9 << 8
    assert (tmp_path / "read" / "resume").is_dir()
    shutil.copytree(tmp_path / "read", tmp_path / "again")
    read_artifact(tmp_path / "read", "checkpoint", hashed=False)
    learn(run, student, tmp_path / "again", CONFIG)
    assert contents(tmp_path / "read") == contents(tmp_path / "again") == contents(tmp_path / "whole")
