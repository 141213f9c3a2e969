"""Runs an untrusted program: a model's response to MBPP.

    python -I -B sandbox.py REPORT-FILE-DESCRIPTOR < program

A first line before the program holds a token, which the report repeats when the program ends without an exception.

The program runs in a Python process of its own. Before its first line, the process drops every system call that a
computation does not need (seccomp, through libseccomp, without privileges). The program cannot open a socket, start a
process or thread, send a signal, or open a file for writing. Its environment is empty; an empty temporary directory is
its home and working directory; CPU time, memory, open files and file size are limited; its output is discarded. The
process is killed when its time is over. It cannot start others, so killing it ends everything that it does.
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

ALLOWED_SYSTEM_CALLS = """
    access brk clock_getres clock_gettime clock_nanosleep close dup epoll_create1 exit exit_group faccessat
    faccessat2 fstat fstatfs futex get_robust_list getcwd getdents getdents64 getegid geteuid getgid getpgrp
    getpid getppid getrandom getresgid getresuid getrlimit getrusage getsid gettid gettimeofday getuid lseek lstat
    madvise mincore mmap mprotect mremap munmap nanosleep newfstatat pause poll ppoll pread64 preadv pselect6
    read readlink readlinkat readv restart_syscall rseq rt_sigaction rt_sigpending rt_sigprocmask rt_sigreturn
    rt_sigsuspend rt_sigtimedwait sched_getaffinity sched_yield select set_robust_list set_tid_address setitimer
    sigaltstack stat statfs statx sysinfo time times uname write writev"""
"""All other system calls are refused, except `open` and `openat` for reading and the requests below."""
ALLOWED_REQUESTS = {"fcntl": (0, 1, 2, 3, 1030), "ioctl": (0x5401, 0x5450, 0x5451)}
"""The requests that Python itself makes: duplicate a descriptor, flags, close on exec, is this a terminal. Others could
send signals or type into a terminal."""
WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
ALLOW, REFUSE = 0x7FFF0000, 0x00050000 | 1
"""Actions of libseccomp; 1 is EPERM."""
EQUAL_WHEN_MASKED = 7
"""libseccomp's SCMP_CMP_MASKED_EQ."""


@dataclass(frozen=True, slots=True)
class Outcome:
    passed: bool
    """The program ended without an exception."""
    error: str
    """The exception, or the limit that ended the program; empty when it passed."""


def run_program(program: str) -> Outcome:
    """Run a Python program in the sandbox. Its output is discarded."""
    token = secrets.token_hex(16)
    with TemporaryDirectory(prefix="tsdkd-") as directory:
        reading, writing = os.pipe()
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", str(Path(__file__).resolve()), str(writing)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=directory,
            env={"HOME": directory, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
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
                report = (pipe.read(REPORT_BYTES) or b"").decode(errors="replace")
    if report == token:
        return Outcome(True, "")
    return Outcome(False, report or f"exited, or exceeded a limit (status {process.returncode})")


def check_confinement() -> str | None:
    """Run test programs in the sandbox. Returns the reason why it does not confine them, or None when it does."""
    outcome = run_program("")
    if not outcome.passed:
        return outcome.error
    for action, program in (("open a socket", "import socket; socket.socket()"), ("fork", "import os; os.fork()")):
        if "PermissionError" not in run_program(program).error:
            return f"a test program could {action}"
    return None


def _confine() -> None:
    """Set the limits, then the filter of system calls; neither can be undone."""
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
    for name in ALLOWED_SYSTEM_CALLS.split():
        _allow_call(library, rules, name)
    for name, flags in (("open", 1), ("openat", 2)):
        _allow_call(library, rules, name, _ArgumentComparison(flags, EQUAL_WHEN_MASKED, WRITE_FLAGS, 0))
    for name, requests in ALLOWED_REQUESTS.items():
        for request in requests:
            _allow_call(library, rules, name, _ArgumentComparison(1, EQUAL_WHEN_MASKED, 0xFFFFFFFF, request))
    if library.seccomp_load(rules):
        raise OSError(ctypes.get_errno(), "seccomp_load")


class _ArgumentComparison(ctypes.Structure):
    """libseccomp's scmp_arg_cmp, for comparisons with a mask."""

    _fields_ = (
        ("argument", ctypes.c_uint),
        ("operator", ctypes.c_int),
        ("mask", ctypes.c_uint64),
        ("value", ctypes.c_uint64),
    )


def _allow_call(library: Any, rules: ctypes.c_void_p, name: str, *comparisons: _ArgumentComparison) -> None:
    number = library.seccomp_syscall_resolve_name(name.encode())
    if number < 0:  # this architecture has no such call
        return
    array = (_ArgumentComparison * len(comparisons))(*comparisons)
    if library.seccomp_rule_add_array(rules, ctypes.c_uint32(ALLOW), number, len(comparisons), array):
        raise OSError(f"libseccomp refuses the rule for {name}")


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
