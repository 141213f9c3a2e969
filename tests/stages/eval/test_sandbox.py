"""An untrusted program computes, and nothing that it tries reaches beyond its process."""

from ctypes.util import find_library
from pathlib import Path

import psutil
import pytest

from tsdkd.stages.eval import sandbox

pytestmark = pytest.mark.skipif(find_library("seccomp") is None, reason="needs libseccomp")


def test_this_machine_confines() -> None:
    assert sandbox.check_confinement() is None


def test_only_a_program_that_ends_without_an_exception_passes() -> None:
    assert sandbox.run_program("import math, re, heapq, collections\nassert math.gcd(4, 6) == 2").passed
    assert sandbox.run_program("assert 1 == 2, 'no'").error == "AssertionError: no"
    assert sandbox.run_program("def f(:").error.startswith("SyntaxError")
    for early_exit in ("import sys; sys.exit(0)", "import os; os._exit(0)", "raise KeyboardInterrupt"):
        assert not sandbox.run_program(f"{early_exit}\nassert False").passed


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


@pytest.mark.parametrize("attempt", REFUSED)
def test_a_refused_attempt(attempt: str) -> None:
    assert "PermissionError" in sandbox.run_program(REFUSED[attempt]).error


def test_threads_are_refused() -> None:
    outcome = sandbox.run_program("import threading\nwhile True: threading.Thread(target=input).start()")
    assert "can't start new thread" in outcome.error


def test_memory_is_limited() -> None:
    assert sandbox.run_program("x = bytearray(2 * 1024 ** 3)").error.startswith("MemoryError")
    assert not sandbox.run_program("x = []\nwhile True: x.append(bytearray(10 ** 6))").passed


def test_a_limit_cannot_be_raised() -> None:
    infinite = "resource.RLIM_INFINITY"
    outcome = sandbox.run_program(f"import resource; resource.setrlimit(resource.RLIMIT_AS, ({infinite}, {infinite}))")
    assert not outcome.passed


@pytest.mark.parametrize(
    "attempt",
    [
        "open(DIRECTORY / 'new', 'w').write('x')",
        "open(DIRECTORY / 'old', 'a').write('x')",
        "(DIRECTORY / 'old').unlink()",
        "(DIRECTORY / 'old').rename(DIRECTORY / 'new')",
        "(DIRECTORY / 'new').mkdir()",
        "(DIRECTORY / 'new').symlink_to('old')",
        "(DIRECTORY / 'old').chmod(0)",
        "os.truncate(DIRECTORY / 'old', 0)",
    ],
)
def test_no_file_outside_is_written(attempt: str, tmp_path: Path) -> None:
    (tmp_path / "old").write_text("unchanged")
    outcome = sandbox.run_program(f"import os, pathlib\nDIRECTORY = pathlib.Path({str(tmp_path)!r})\n{attempt}")
    assert "PermissionError" in outcome.error
    assert [file.name for file in tmp_path.iterdir()] == ["old"]
    assert (tmp_path / "old").read_text() == "unchanged"


def test_the_home_directory_is_empty_and_temporary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "x")
    outcome = sandbox.run_program(
        "import os\nassert os.environ['HOME'] == os.getcwd() and os.listdir() == [] and 'SECRET' not in os.environ\n"
        "raise ValueError(os.getcwd())"
    )
    assert outcome.error.startswith("ValueError: /")
    assert not Path(outcome.error.removeprefix("ValueError: ")).exists()


def test_an_endless_loop_exceeds_the_cpu_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "WALL_SECONDS", 120.0)  # on a busy machine CPU time passes slowly
    assert "exited, or exceeded a limit (status -" in sandbox.run_program("while True: pass").error


@pytest.mark.parametrize("program", ["import time; time.sleep(60)", "while True: print('x' * 10 ** 6)"])
def test_waiting_and_endless_output_exceed_the_time_limit(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "WALL_SECONDS", 1.0)
    assert sandbox.run_program(program).error == "ran longer than 1 seconds"


def test_the_error_is_short() -> None:
    assert len(sandbox.run_program("raise ValueError('x' * 10 ** 6)").error) == sandbox.REPORT_BYTES


def test_no_process_or_open_file_is_left() -> None:
    files, children = set(Path("/proc/self/fd").iterdir()), psutil.Process().children()
    sandbox.run_program("open(__file__)")
    assert set(Path("/proc/self/fd").iterdir()) == files
    assert psutil.Process().children() == children


@pytest.mark.parametrize(
    ("outcome", "failure"),
    [
        (sandbox.Outcome(True, ""), "a test program could open a socket"),
        (sandbox.Outcome(False, "not confined: no libseccomp"), "not confined: no libseccomp"),
    ],
)
def test_a_machine_that_does_not_confine_is_detected(
    outcome: sandbox.Outcome, failure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "run_program", lambda _: outcome)
    assert sandbox.check_confinement() == failure
