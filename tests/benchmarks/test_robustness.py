"""The campaigns' tools: kills at exact system calls, and one table of all campaigns."""

import json
import shutil
import signal
import subprocess
import sys
import threading
from importlib import import_module
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from benchmarks.robustness import __main__ as runner
from benchmarks.robustness.rows import Row, read_rows, write_rows_and_exit
from benchmarks.robustness.system_calls import SUPPORTED, Kill, Outcome, run_traced

pytestmark = pytest.mark.skipif(not SUPPORTED, reason="system calls are traced on Linux on x86-64 only")


def write() -> None:
    """Paths are relative: the working directory is the traced one."""
    Path("text.tmp").write_text("0123456789")
    Path("text.tmp").rename("text")
    pq.write_table(pa.table({"x": [1]}), "table")
    save_file({"x": torch.zeros(2)}, "weights")
    torch.save({"x": torch.zeros(2)}, "state")
    thread = threading.Thread(target=lambda: Path("thread").write_text("text"))
    thread.start()
    thread.join()
    subprocess.run(["/bin/sh", "-c", "echo > process"], check=True)
    Path("text").read_text()
    Path("directory").mkdir()
    shutil.rmtree("directory")


@pytest.fixture
def traced(tmp_path: Path) -> Path:
    directory = tmp_path / "traced"
    directory.mkdir()
    return directory


def run(directory: Path, kill: Kill | None = None) -> Outcome:
    return run_traced(write, directory, directory.with_name("output"), kill)


def test_calls_of_every_library_thread_and_process_are_seen(traced: Path) -> None:
    outcome = run(traced)
    assert outcome.status == 0
    calls = [(call.name, call.path) for call in outcome.calls]
    assert calls[:4] == [
        ("openat", "text.tmp"),
        ("write", "text.tmp"),
        ("rename", "text.tmp"),
        ("openat", "table"),
    ]
    assert {path for _, path in calls} >= {"state", "thread", "process"}
    assert calls[-2:] == [("mkdir", "directory"), ("rmdir", "directory")]
    assert any(name.startswith("rename") and "text" not in path for name, path in calls)  # safetensors' own file


@pytest.mark.parametrize(
    ("kill", "left"),
    [
        (Kill(1), {}),
        (Kill(2), {"text.tmp": ""}),
        (Kill(2, halved=True), {"text.tmp": "01234"}),
        (Kill(3), {"text.tmp": "0123456789"}),
        (Kill(4), {"text": "0123456789"}),
    ],
)
def test_a_process_is_killed_before_a_call(traced: Path, kill: Kill, left: dict[str, str]) -> None:
    outcome = run(traced, kill)
    assert outcome.status == -signal.SIGKILL
    assert len(outcome.calls) == kill.call
    assert {file.name: file.read_text() for file in traced.iterdir()} == left


def test_errors_and_exit_codes_are_those_of_the_work(traced: Path) -> None:
    def fail() -> None:
        raise OSError("no such thing")

    def leave() -> None:
        raise SystemExit(7)

    output = traced.with_name("output")
    assert run_traced(fail, traced, output).status == 1
    assert "no such thing" in output.read_text()
    assert run_traced(leave, traced, output).status == 7


def test_rows_are_written_and_faults_exit_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [Row("a", 3, 0, {"kills": 4}), Row("b", 2, 1)]
    with pytest.raises(SystemExit, match="True"):
        write_rows_and_exit("Title", rows, tmp_path / "rows.json")
    assert read_rows(tmp_path / "rows.json") == rows
    total = capsys.readouterr().out.splitlines()[-2]
    assert total.split("│")[1:5] == [" all ", " 5      ", " 1      ", " 4     "]
    with pytest.raises(SystemExit, match="False"):
        write_rows_and_exit("Title", rows[:1], None)


def test_every_campaign_is_found_and_its_rows_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "kills" in runner.find_campaigns()
    assert not {"rows", "trees", "system_calls", "kill_cases"} & {*runner.find_campaigns()}
    rows = [{"name": "a", "trials": 3, "faults": 0, "counts": {"kills": 4}}]

    def run_process(words: list[str], **_: object) -> None:
        assert words[3:5] == ["--seed", "1"]
        if words[2].endswith("whole"):
            Path(words[words.index("--json") + 1]).write_text(json.dumps(rows))

    monkeypatch.setattr(runner.subprocess, "run", run_process)
    assert runner.run_campaign("whole", {"--seed": "1"}) == [Row("whole: a", 3, 0, {"kills": 4})]
    assert runner.run_campaign("broken", {"--seed": "1"}) == [Row("broken: ended without rows", 0, 1)]


@pytest.mark.parametrize("name", runner.find_campaigns())
def test_every_campaign_has_the_common_options(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    campaign = import_module(f"benchmarks.robustness.{name}")
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit):
        campaign.main()
    assert {"--trials", "--seed", "--json"} <= {*capsys.readouterr().out.split()}
