"""Every stage, killed in the middle and run again, ends with the same bytes."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.prompts import write_prompts
from tsdkd.artifacts.journal import read_sessions

Contents = Callable[[Path], dict[str, bytes]]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "tsdkd", *map(str, words)]


def complete(words: list[str], directory: Path) -> None:
    subprocess.run(words, cwd=directory, env=ENVIRONMENT, check=True, capture_output=True)


def stop_when(words: list[str], directory: Path, is_time: Callable[[], bool], number: signal.Signals) -> int:
    """Start a command, send it a signal as soon as `is_time` is true, and return its exit status."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits that it is ignored
    process = subprocess.Popen(
        words, cwd=directory, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 300
    while not is_time():
        assert process.poll() is None, "the stage ended before it could be stopped"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(number)
    return process.wait(timeout=120)


@pytest.fixture(scope="module")
def directory(student: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run in `whole/run`, and the same inputs in `cut/`."""
    directory = tmp_path_factory.mktemp("kill")
    for name in ("whole", "cut"):
        (directory / name).mkdir()
        write_prompts(directory / name / "prompts.jsonl", 40)
    for words in stages(student, teacher).values():
        complete(words, directory / "whole")
    return directory


def stages(student: Path, teacher: Path) -> dict[str, list[str]]:
    run = ("--run", "run")
    return {
        "rollouts": command(
            "generate",
            *run,
            "--student",
            student,
            "--prompts",
            "prompts.jsonl",
            "--engine",
            "transformers",
            "--max-new-tokens",
            40,
            "--part-size",
            5,
        ),
        "scores": command("score", *run, "--teacher", teacher, "--batch-tokens", 200),
        "checkpoint": command(
            "train", *run, "--batch-size", 4, "--epochs", 4, "--save-steps", 1, "--precision", "float32"
        ),
    }


def begun(kind: str, run: Path) -> bool:
    if kind == "checkpoint":
        return len(list((run / kind / "resume").glob("checkpoint-*/tsdkd_state.json"))) >= 2
    return len(list((run / kind).glob("*.parquet"))) >= 2


def test_kill_9_while_a_checkpoint_is_replaced(
    directory: Path, student: Path, teacher: Path, contents: Contents, tmp_path: Path
) -> None:
    """The old checkpoint stays whole, and the same command continues where it was killed."""
    run, pending = tmp_path / "run", tmp_path / "run" / ".checkpoint.tsdkd-new"
    shutil.copytree(directory / "whole", tmp_path, dirs_exist_ok=True)
    whole, words = contents(run / "checkpoint"), [*stages(student, teacher)["checkpoint"], "--overwrite"]

    def two_steps_are_saved() -> bool:
        return len(list((pending / "resume").glob("checkpoint-*/tsdkd_state.json"))) >= 2

    assert stop_when(words, tmp_path, two_steps_are_saved, signal.SIGKILL) == -signal.SIGKILL
    assert contents(run / "checkpoint") == whole
    complete(words, tmp_path)
    assert [session.exit for session in read_sessions(run / "checkpoint")] == ["", "finished"]
    assert contents(run / "checkpoint") == whole
    assert not pending.exists()


def test_kill_9_in_every_stage(directory: Path, student: Path, teacher: Path, contents: Contents) -> None:
    cut = directory / "cut"
    for kind, words in stages(student, teacher).items():
        status = stop_when(words, cut, lambda kind=kind: begun(kind, cut / "run"), signal.SIGKILL)
        assert status == -signal.SIGKILL
        assert '"state": "partial"' in (cut / "run" / kind / "manifest.json").read_text()
        complete(words, cut)
        assert [session.exit for session in read_sessions(cut / "run" / kind)] == ["", "finished"]
        assert contents(cut / "run" / kind) == contents(directory / "whole" / "run" / kind), kind


@pytest.mark.parametrize("kind", ["rollouts", "checkpoint"])
def test_ctrl_c_exits_130_and_resumes(
    directory: Path, student: Path, teacher: Path, contents: Contents, tmp_path: Path, kind: str
) -> None:
    words = stages(student, teacher)
    write_prompts(tmp_path / "prompts.jsonl", 40)
    if kind == "checkpoint":
        complete(words["rollouts"], tmp_path)
        complete(words["scores"], tmp_path)
    assert stop_when(words[kind], tmp_path, lambda: begun(kind, tmp_path / "run"), signal.SIGINT) == 130
    complete(words[kind], tmp_path)
    assert contents(tmp_path / "run" / kind) == contents(directory / "whole" / "run" / kind)


def test_kill_9_between_two_benchmarks(student: Path, rows: Path, tmp_path: Path, contents: Contents) -> None:
    """The complete benchmark is not run again, and the results are those of an uninterrupted run."""

    def words(name: str) -> list[str]:
        wanted = ("--tasks", "gsm8k,sciq", "--data", rows, "--max-new-tokens", 60, "--batch-size", 1)
        return command("eval", "--model", f"m={student}", *wanted, "--results", name)

    complete(words("whole"), tmp_path)
    cut = tmp_path / "cut" / "m"

    def listed() -> bool:
        manifest = cut / "manifest.json"
        return manifest.is_file() and "gsm8k.json" in manifest.read_text()

    assert stop_when(words("cut"), tmp_path, listed, signal.SIGKILL) == -signal.SIGKILL
    assert '"state": "partial"' in (cut / "manifest.json").read_text()
    before = (cut / "gsm8k.json").stat().st_mtime_ns
    complete(words("cut"), tmp_path)
    assert (cut / "gsm8k.json").stat().st_mtime_ns == before
    assert contents(cut) == contents(tmp_path / "whole" / "m")
