"""An untrusted program computes, and nothing that it or its tests try reaches beyond their processes."""

import os
import signal
import subprocess
import sys
import time
from ctypes.util import find_library
from pathlib import Path

import psutil
import pytest

from tsdkd.stages.eval.sandbox import verdict
from tsdkd.stages.eval.sandbox.verdict import Verdict, hides_files, judge_program

pytestmark = pytest.mark.skipif(find_library("seccomp") is None, reason="needs libseccomp")


def run(program: str) -> Verdict:
    """The verdict on a program whose only test always passes."""
    return judge_program(program, ["assert True"])


def test_this_machine_confines() -> None:
    assert verdict.check_confinement() is None


REFUSED = {
    "a network call": "import socket; socket.create_connection(('127.0.0.1', 1))",
    "a Unix socket": "import socket; socket.socket(socket.AF_UNIX)",
    "a pair of datagram sockets": "import socket; socket.socketpair(type=socket.SOCK_DGRAM)",
    "a message to an address": "import socket; socket.socketpair()[0].sendto(b'x', '/dev/log')",
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
    assert "PermissionError" in run(REFUSED[attempt]).reason


WRITES = {
    "a new file": "open(DIRECTORY / 'new', 'w').write('x')",
    "more": "open(DIRECTORY / 'old', 'a').write('x')",
    "a removal": "(DIRECTORY / 'old').unlink()",
    "a new name": "(DIRECTORY / 'old').rename(DIRECTORY / 'new')",
    "a directory": "(DIRECTORY / 'new').mkdir()",
    "a link": "(DIRECTORY / 'new').symlink_to('old')",
    "rights": "(DIRECTORY / 'old').chmod(0)",
    "a size": "os.truncate(DIRECTORY / 'old', 0)",
}


@pytest.mark.parametrize("attempt", WRITES)
def test_no_file_outside_is_written(attempt: str, tmp_path: Path) -> None:
    (tmp_path / "old").write_text("unchanged")
    found = run(f"import os, pathlib\nDIRECTORY = pathlib.Path({str(tmp_path)!r})\n{WRITES[attempt]}")
    assert "PermissionError" in found.reason
    assert [file.name for file in tmp_path.iterdir()] == ["old"]
    assert (tmp_path / "old").read_text() == "unchanged"


def test_the_process_of_the_tests_is_confined_too(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("unchanged")
    statements = [*REFUSED.values(), *WRITES.values()]
    test = f"""import os, pathlib
DIRECTORY = pathlib.Path({str(tmp_path)!r})
for statement in {statements!r}:
    try:
        exec(statement)
    except PermissionError:
        continue
    raise AssertionError(statement)"""
    assert judge_program("", [test]) == Verdict(True)
    assert (tmp_path / "old").read_text() == "unchanged"


def test_memory_is_limited() -> None:
    found = run("x = bytearray(2 * 1024 ** 3)")
    assert found.reason.startswith("MemoryError")
    assert found.limit == "memory"
    assert not run("x = []\nwhile True: x.append(bytearray(10 ** 6))").passed


def test_a_limit_cannot_be_raised() -> None:
    infinite = "resource.RLIM_INFINITY"
    assert not run(f"import resource; resource.setrlimit(resource.RLIMIT_AS, ({infinite}, {infinite}))").passed


def test_the_environment_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "x")
    assert run("import os\nassert os.environ['HOME'] == os.getcwd() == '/' and 'SECRET' not in os.environ").passed


@pytest.mark.skipif(not hides_files(), reason="needs a kernel with Landlock")
def test_the_users_files_and_other_processes_are_hidden(tmp_path: Path) -> None:
    (tmp_path / "answers").write_text("3")
    for path in (tmp_path / "answers", tmp_path, "/proc/self/mem", f"/proc/{os.getpid()}/mem", "/proc"):
        found = run(f"import os\nos.listdir({str(path)!r}) if os.path.isdir({str(path)!r}) else open({str(path)!r})")
        assert found.reason.startswith("PermissionError")
        assert found.limit == "files"


def test_an_endless_loop_exceeds_the_cpu_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdict, "WALL_SECONDS", 120.0)  # on a busy machine CPU time passes slowly
    monkeypatch.setattr(verdict, "CPU_SECONDS", 1)
    found = run("while True: pass")
    assert found.reason == "the program ended its process by SIGKILL after 1 seconds of CPU time"
    assert found.limit == "time"


@pytest.mark.parametrize("program", ["import time; time.sleep(60)", "while True: print('x' * 10 ** 6)"])
def test_waiting_and_endless_output_exceed_the_time_limit(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdict, "WALL_SECONDS", 1.0)
    assert run(program) == Verdict(False, "ran longer than 1 seconds", "time")


def test_no_process_or_open_file_is_left() -> None:
    files, children = set(Path("/proc/self/fd").iterdir()), psutil.Process().children()
    run("open(__file__)")
    assert set(Path("/proc/self/fd").iterdir()) == files
    assert psutil.Process().children() == children


def test_the_program_ends_with_a_killed_parent_and_leaves_no_file(tmp_path: Path) -> None:
    code = """from tsdkd.stages.eval.sandbox import verdict
verdict.WALL_SECONDS = 1e6
verdict.judge_program('import time\\ntime.sleep(1e6)', ['assert True'])"""
    root = Path(__file__).parents[4]
    parent = psutil.Popen(
        [sys.executable, "-c", code], cwd=root, env=os.environ | {"PYTHONPATH": str(root), "TMPDIR": str(tmp_path)}
    )
    while len(started := parent.children(recursive=True)) < 3:  # supervisor, program, tests
        assert parent.poll() is None
        time.sleep(0.01)
    parent.kill()
    parent.wait()
    for _ in range(6000):
        left = [process for process in started if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
        if not left:
            break
        time.sleep(0.01)
    for process in left:
        process.kill()
    assert not left
    assert list(tmp_path.iterdir()) == []


def test_a_process_ends_if_its_parent_ended_before_it_asked_the_kernel() -> None:
    ended = subprocess.run(
        [sys.executable, "-I", "-B", verdict.SUPERVISOR, str(2**30), "1", "1"],
        input=b"",
        stdout=subprocess.PIPE,
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (1, b"")


def test_a_killed_supervisor_is_a_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    real = subprocess.Popen.communicate

    def kill_first(process: "subprocess.Popen[bytes]", *arguments: object, **keywords: object) -> object:
        process.send_signal(signal.SIGKILL)
        return real(process, *arguments, **keywords)  # type: ignore[arg-type]

    monkeypatch.setattr(subprocess.Popen, "communicate", kill_first)
    assert run("") == Verdict(False, "not confined: the sandbox ended (status -9)")


@pytest.mark.parametrize(
    ("found", "failure"),
    [
        (Verdict(True), "a program could open a socket"),
        (Verdict(False, "not confined: no libseccomp"), "not confined: no libseccomp"),
    ],
)
def test_a_machine_that_does_not_confine_is_detected(
    found: Verdict, failure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verdict, "judge_program", lambda *_: found)
    assert verdict.check_confinement() == failure
