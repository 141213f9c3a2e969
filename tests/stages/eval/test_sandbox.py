"""A program that nobody has read: what it computes counts, and nothing it tries reaches beyond its process."""

import os
from ctypes.util import find_library
from pathlib import Path

import pytest

from tsdkd.stages.eval import sandbox

pytestmark = pytest.mark.skipif(find_library("seccomp") is None, reason="needs libseccomp")


def test_this_machine_confines() -> None:
    assert sandbox.why_unavailable() is None


def test_only_a_program_that_comes_to_its_end_passes() -> None:
    assert sandbox.run("import math, re, heapq, collections\nassert math.gcd(4, 6) == 2").passed
    assert sandbox.run("assert 1 == 2, 'no'").why == "AssertionError: no"
    assert sandbox.run("def f(:").why.startswith("SyntaxError")
    for leaving in ("import sys; sys.exit(0)", "import os; os._exit(0)", "raise KeyboardInterrupt"):
        assert not sandbox.run(f"{leaving}\nassert False").passed


REFUSED = {
    "a network call": "import socket; socket.create_connection(('127.0.0.1', 1))",
    "a fork bomb": "import os\nwhile True: os.fork()",
    "a process": "import subprocess; subprocess.run(['true'])",
    "another program": "import os; os.execv('/bin/true', ['true'])",
    "killing its parent": "import os; os.kill(os.getppid(), 9)",
    "killing its group": "import os; os.killpg(0, 9)",
    "a signal by way of a file": "import fcntl, os; fcntl.fcntl(1, fcntl.F_SETOWN, os.getppid())",
    "its parent's limits": "import os, resource; resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (0, 0))",
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what: str) -> None:
    assert "PermissionError" in sandbox.run(REFUSED[what]).why


def test_threads_are_refused() -> None:
    found = sandbox.run("import threading\nwhile True: threading.Thread(target=input).start()")
    assert "can't start new thread" in found.why


def test_memory_is_limited() -> None:
    assert sandbox.run("x = bytearray(2 * 1024 ** 3)").why.startswith("MemoryError")
    assert not sandbox.run("x = []\nwhile True: x.append(bytearray(10 ** 6))").passed


def test_a_limit_is_not_raised_again() -> None:
    infinite = "resource.RLIM_INFINITY"
    found = sandbox.run(f"import resource; resource.setrlimit(resource.RLIMIT_AS, ({infinite}, {infinite}))")
    assert not found.passed


@pytest.mark.parametrize(
    "attempt",
    [
        "open(PLACE / 'new', 'w').write('x')",
        "open(PLACE / 'old', 'a').write('x')",
        "(PLACE / 'old').unlink()",
        "(PLACE / 'old').rename(PLACE / 'new')",
        "(PLACE / 'new').mkdir()",
        "(PLACE / 'new').symlink_to('old')",
        "(PLACE / 'old').chmod(0)",
        "os.truncate(PLACE / 'old', 0)",
    ],
)
def test_no_file_outside_is_written(attempt: str, tmp_path: Path) -> None:
    (tmp_path / "old").write_text("as it was")
    found = sandbox.run(f"import os, pathlib\nPLACE = pathlib.Path({str(tmp_path)!r})\n{attempt}")
    assert "PermissionError" in found.why
    assert [file.name for file in tmp_path.iterdir()] == ["old"]
    assert (tmp_path / "old").read_text() == "as it was"


def test_home_is_an_empty_directory_that_is_gone_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "x")
    found = sandbox.run(
        "import os\nassert os.environ['HOME'] == os.getcwd() and os.listdir() == [] and 'SECRET' not in os.environ\n"
        "raise ValueError(os.getcwd())"
    )
    assert found.why.startswith("ValueError: /")
    assert not Path(found.why.removeprefix("ValueError: ")).exists()


def test_an_endless_loop_ends_by_processor_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "WALL_SECONDS", 120.0)  # a busy machine gives little of its time
    assert "ended by itself or by a limit (status -" in sandbox.run("while True: pass").why


@pytest.mark.parametrize("program", ["import time; time.sleep(60)", "while True: print('x' * 10 ** 6)"])
def test_waiting_and_endless_output_end_by_the_clock(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "WALL_SECONDS", 1.0)
    assert sandbox.run(program).why == "ran longer than 1 seconds"


def test_what_it_says_of_its_end_is_short() -> None:
    assert len(sandbox.run("raise ValueError('x' * 10 ** 6)").why) == sandbox.REPORT_BYTES


def test_nothing_is_left_of_it() -> None:
    before = set(Path("/proc/self/fd").iterdir())
    sandbox.run("open(__file__)")
    assert set(Path("/proc/self/fd").iterdir()) == before
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


@pytest.mark.parametrize(
    ("outcome", "reason"),
    [
        (sandbox.Outcome(True, ""), "the network stayed open to a test program"),
        (sandbox.Outcome(False, "not confined: no libseccomp"), "not confined: no libseccomp"),
    ],
)
def test_a_machine_that_does_not_confine_is_found_out(
    outcome: sandbox.Outcome, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "run", lambda _: outcome)
    assert sandbox.why_unavailable() == reason
