"""Runs a program that nobody has read: a model's answer to MBPP.

    python -I -B sandbox.py TOKEN-FILE-DESCRIPTOR < program

The program runs in a Python process of its own which has given up, before the program's first line, every system call
but those that computing needs (seccomp, through libseccomp; no privilege is needed): it can open no socket, start no
process or thread, signal nobody, and open no file for writing. It has an empty environment, an empty temporary
directory as home and working directory, limits on CPU time, memory, files and file size, no output, and is killed when
its time is over. As nothing it does can outlive it, killing that one process is enough.
"""

import ctypes
import os
import resource
import secrets
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

CPU_SECONDS = 5
WALL_SECONDS = 10.0
MEMORY_BYTES = 1 << 30
OPEN_FILES = 32
REPORT_BYTES = 500

COMPUTING = """access brk clock_getres clock_gettime clock_nanosleep close dup epoll_create1 exit exit_group faccessat
    faccessat2 fstat fstatfs futex get_robust_list getcwd getdents getdents64 getegid geteuid getgid getpgrp
    getpid getppid getrandom getresgid getresuid getrlimit getrusage getsid gettid gettimeofday getuid lseek lstat
    madvise mincore mmap mprotect mremap munmap nanosleep newfstatat pause poll ppoll pread64 preadv pselect6
    read readlink readlinkat readv restart_syscall rseq rt_sigaction rt_sigpending rt_sigprocmask rt_sigreturn
    rt_sigsuspend rt_sigtimedwait sched_getaffinity sched_yield select set_robust_list set_tid_address setitimer
    sigaltstack stat statfs statx sysinfo time times uname write writev"""
"""What a program that computes asks of the kernel; all else is refused. Files may be opened too, but for reading."""
HARMLESS = {"fcntl": (0, 1, 2, 3, 1030), "ioctl": (0x5401, 0x5450, 0x5451)}
"""Python's own requests: duplicate, flags, close on exec; is this a terminal? Others could signal and type."""
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
ALLOW, REFUSE = 0x7FFF0000, 0x00050000 | 1
"""libseccomp's actions; 1 is EPERM."""
EQUAL_WHEN_MASKED = 7


@dataclass(frozen=True, slots=True)
class Outcome:
    passed: bool
    """The program came to its end without an exception."""
    why: str
    """Else the exception, or what stopped it."""


def run(program: str) -> Outcome:
    """Run a Python program confined. What it prints is lost."""
    token = secrets.token_hex(16)
    with TemporaryDirectory(prefix="tsdkd-") as place:
        reading, writing = os.pipe()
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", str(Path(__file__).resolve()), str(writing)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=place,
            env={"HOME": place, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            pass_fds=(writing,),
            start_new_session=True,
        )
        os.close(writing)
        try:
            process.communicate(f"{token}\n{program}".encode(errors="replace"), timeout=WALL_SECONDS)
        except subprocess.TimeoutExpired:
            return Outcome(False, f"ran longer than {WALL_SECONDS:g} seconds")
        finally:
            process.kill()
            process.wait()
            with os.fdopen(reading, "rb") as pipe:
                os.set_blocking(reading, False)
                said = (pipe.read(REPORT_BYTES) or b"").decode(errors="replace")
    if said == token:
        return Outcome(True, "")
    return Outcome(False, said or f"ended by itself or by a limit (status {process.returncode})")


def why_unavailable() -> str | None:
    """Why programs cannot be confined on this machine; None where they can. Tried, not assumed."""
    idle = run("")
    if not idle.passed:
        return idle.why
    for what, attempt in (("the network", "import socket; socket.socket()"), ("processes", "import os; os.fork()")):
        if "PermissionError" not in run(attempt).why:
            return f"{what} stayed open to a test program"
    return None


def _confine() -> None:
    """Limits first, then the filter, which cannot be taken off again."""
    for limit, value in (
        (resource.RLIMIT_CPU, CPU_SECONDS),
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value))
    library = ctypes.CDLL("libseccomp.so.2", use_errno=True)
    library.seccomp_init.restype = ctypes.c_void_p
    rules = ctypes.c_void_p(library.seccomp_init(ctypes.c_uint32(REFUSE)))
    for name in COMPUTING.split():
        _allow(library, rules, name)
    for name, flags in (("open", 1), ("openat", 2)):
        _allow(library, rules, name, _Comparison(flags, EQUAL_WHEN_MASKED, WRITING, 0))
    for name, requests in HARMLESS.items():
        for request in requests:
            _allow(library, rules, name, _Comparison(1, EQUAL_WHEN_MASKED, 0xFFFFFFFF, request))
    if library.seccomp_load(rules):
        raise OSError(ctypes.get_errno(), "seccomp_load")


class _Comparison(ctypes.Structure):
    """libseccomp's scmp_arg_cmp."""

    _fields_ = (
        ("argument", ctypes.c_uint),
        ("operator", ctypes.c_int),
        ("one", ctypes.c_uint64),
        ("other", ctypes.c_uint64),
    )


def _allow(library: Any, rules: ctypes.c_void_p, name: str, *comparisons: _Comparison) -> None:
    number = library.seccomp_syscall_resolve_name(name.encode())
    if number < 0:  # this architecture has no such call
        return
    listed = (_Comparison * len(comparisons))(*comparisons)
    if library.seccomp_rule_add_array(rules, ctypes.c_uint32(ALLOW), number, len(comparisons), listed):
        raise OSError(f"seccomp refuses a rule for {name}")


def _main() -> None:
    report: Callable[[str], int] = lambda text: os.write(int(sys.argv[1]), text.encode()[:REPORT_BYTES])  # noqa: E731
    token, _, program = sys.stdin.read().partition("\n")
    try:
        _confine()
    except OSError as error:
        report(f"not confined: {error}")
        return
    try:
        exec(compile(program, "program", "exec"), {"__name__": "__main__"})
    except BaseException as error:
        report(f"{type(error).__name__}: {error}")
    else:
        report(token)


if __name__ == "__main__":
    _main()
