"""Runs work in a forked process, lists the system calls with which it changes a directory, and kills it at one of them.

The child filters its own system calls (seccomp), so only calls that can change files stop it; the parent traces them
(ptrace). Both see every thread and every library, in Python, C++ and Rust. Covered: opening for writing, writes to
files, rename (also exchange), link, unlink, mkdir, rmdir, truncate, allocate, chmod, chown, times and sync. Not
covered: memory that is mapped for writing and io_uring. Linux on x86-64.
"""

import ctypes
import os
import platform
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

SUPPORTED = sys.platform == "linux" and platform.machine() == "x86_64"
CALLS = {
    ("file", 0): {
        "write": 1,
        "pwrite64": 18,
        "writev": 20,
        "pwritev": 296,
        "pwritev2": 328,
        "sendfile": 40,
        "ftruncate": 77,
        "fallocate": 285,
        "fsync": 74,
        "fdatasync": 75,
        "fchmod": 91,
        "fchown": 93,
    },
    ("file", 2): {"copy_file_range": 326},
    ("path", 0): {
        "open": 2,
        "creat": 85,
        "truncate": 76,
        "rename": 82,
        "link": 86,
        "unlink": 87,
        "rmdir": 84,
        "mkdir": 83,
        "chmod": 90,
        "chown": 92,
        "lchown": 94,
    },
    ("path", 1): {"symlink": 88},
    ("directory", 0): {
        "openat": 257,
        "openat2": 437,
        "renameat": 264,
        "renameat2": 316,
        "linkat": 265,
        "unlinkat": 263,
        "mkdirat": 258,
        "fchmodat": 268,
        "fchmodat2": 452,
        "fchownat": 260,
        "utimensat": 280,
    },
    ("directory", 1): {"symlinkat": 266},
}
"""Names and numbers of the calls, by what names the changed file: an open file, a path, or a directory and then a path,
and by the position of that argument."""
_BY_NUMBER = {
    number: (name, form, position) for (form, position), calls in CALLS.items() for name, number in calls.items()
}
FLAGS_OF_OPEN = {"open": 1, "openat": 2}
"""The argument that tells a call for writing from one for reading."""

_TRACEME, _CONT, _SETOPTIONS, _GET_SYSCALL_INFO = 0, 7, 0x4200, 0x420E
_GETREGS, _SETREGS, _SYSCALL = 12, 13, 24
_EVENTS = {"fork": 1, "vfork": 2, "clone": 3, "exec": 4, "seccomp": 7}
_KILL_WITH_TRACER = 1 << 20
_WALL = 0x40000000
_NO_NEW_PRIVILEGES, _SET_SECCOMP, _FILTER = 38, 22, 2
_TRACE, _ALLOW = 0x7FF00000, 0x7FFF0000
_RDX = 12
"""Position of the third argument among the registers: the bytes of a write."""
_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
_libc.ptrace.restype = ctypes.c_long


@dataclass(frozen=True, slots=True)
class Call:
    """A system call that changes a file."""

    name: str
    path: str
    """Relative to the directory; of two paths, the first."""


@dataclass(frozen=True, slots=True)
class Kill:
    """Where a process is killed."""

    call: int
    """Number of the call, from 1; the signal comes just before it."""
    halved: bool = False
    """Of a write, the first half is written before the kill."""
    signal: int = signal.SIGKILL


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a traced process did."""

    calls: tuple[Call, ...]
    """The calls that change the directory, in order, up to the kill."""
    status: int
    """Exit status; the negative number of a signal."""


def run_traced(work: Callable[[], object], directory: Path, output: Path, kill: Kill | None = None) -> Outcome:
    """Run `work` in a forked process with `directory` as working directory, until it ends or is killed.

    output: file that its standard output and error are appended to; outside the directory.
    """
    child = os.fork()
    if child == 0:
        _become_traced(work, directory, output)
    return _Tracer(child, directory.resolve(), kill).trace()


def _become_traced(work: Callable[[], object], directory: Path, output: Path) -> None:
    """The child: never returns."""
    status = 1
    try:
        os.chdir(directory)
        log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for descriptor in (1, 2):
            os.dup2(log, descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1)  # the parent may have replaced them
        _libc.ptrace(_TRACEME, 0, None, None)
        os.kill(os.getpid(), signal.SIGSTOP)
        _install_filter()
        work()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # the status tells the parent
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


class _Tracer:
    def __init__(self, child: int, directory: Path, kill: Kill | None) -> None:
        self.child, self.directory, self.kill = child, directory, kill
        self.calls: list[Call] = []
        self.tracees: set[int] = set()

    def trace(self) -> Outcome:
        os.waitpid(self.child, _WALL)
        options = _KILL_WITH_TRACER | sum(1 << event for event in _EVENTS.values())
        _ptrace(_SETOPTIONS, self.child, options)
        self.tracees.add(self.child)
        _ptrace(_CONT, self.child, 0)
        while True:
            tracee, status = os.waitpid(-1, _WALL)
            if os.WIFSTOPPED(status):
                self._resume(tracee, status)
                continue
            self.tracees.discard(tracee)
            if tracee == self.child:
                self._end_others()
                return Outcome(tuple(self.calls), os.waitstatus_to_exitcode(status))

    def _resume(self, tracee: int, status: int) -> None:
        """Continue a stopped tracee, after looking at its system call."""
        number, event = os.WSTOPSIG(status), status >> 16
        is_new = tracee not in self.tracees
        self.tracees.add(tracee)
        if event == _EVENTS["seccomp"] and (call := self._changed(tracee)):
            self.calls.append(call)
            if self.kill and len(self.calls) == self.kill.call:
                if self.kill.halved:
                    _halve_write(tracee)
                os.kill(self.child, self.kill.signal)
        silent = event or (is_new and number == signal.SIGSTOP)
        _ptrace(_CONT, tracee, 0 if silent else number)

    def _changed(self, tracee: int) -> Call | None:
        """The call that a tracee is about to make; None for one that leaves the directory as it is."""
        info = (ctypes.c_uint64 * 11)()  # operation, instruction and stack pointers, number, six arguments
        if _ptrace(_GET_SYSCALL_INFO, tracee, ctypes.addressof(info), ctypes.sizeof(info), required=False) <= 0:
            return None
        name, form, position = _BY_NUMBER[info[3]]
        try:
            path = _path_of(form, info[4 + position : 10], Path("/proc") / str(tracee))
        except OSError:  # a descriptor or an address that is not one: the call fails
            return None
        if not path.is_relative_to(self.directory):
            return None
        return Call(name, str(path.relative_to(self.directory)))

    def _end_others(self) -> None:
        """End the processes that the child has started: their calls stop at the tracer, which is gone."""
        for tracee in self.tracees:
            try:
                os.kill(tracee, signal.SIGKILL)
                os.waitpid(tracee, _WALL)
            except (ProcessLookupError, ChildProcessError):
                continue


def _path_of(form: str, arguments: list[int], process: Path) -> Path:
    """The file that a call changes; `arguments` begin with the one that names it, `process` is a directory of /proc."""
    descriptor = ctypes.c_int(arguments[0]).value
    if form == "file":
        return (process / "fd" / str(descriptor)).readlink()
    in_working_directory = form == "path" or descriptor < 0
    start = (process / "cwd" if in_working_directory else process / "fd" / str(descriptor)).readlink()
    return Path(os.path.normpath(start / _read_text(process, arguments[form == "directory"])))


def _read_text(process: Path, address: int) -> str:
    if not address:
        return ""  # the descriptor itself
    memory = os.open(process / "mem", os.O_RDONLY)
    try:
        text = b""
        while b"\0" not in text:
            at = address + len(text)
            text += os.pread(memory, 4096 - at % 4096, at)
        return os.fsdecode(text.partition(b"\0")[0])
    finally:
        os.close(memory)


def _halve_write(tracee: int) -> None:
    """Let a stopped tracee write half of its bytes."""
    registers = (ctypes.c_ulonglong * 27)()
    _ptrace(_GETREGS, tracee, ctypes.addressof(registers))
    registers[_RDX] //= 2
    _ptrace(_SETREGS, tracee, ctypes.addressof(registers))
    _ptrace(_SYSCALL, tracee, 0)
    os.waitpid(tracee, _WALL)


def _ptrace(request: int, tracee: int, data: int, address: int = 0, *, required: bool = True) -> int:
    result = int(_libc.ptrace(request, tracee, address, data))
    code = ctypes.get_errno()
    if result < 0 and required and code != 3:  # ESRCH: the tracee was killed meanwhile
        raise OSError(code, f"ptrace {request}: {os.strerror(code)}")
    return result


class _Instruction(ctypes.Structure):
    _fields_ = (("code", ctypes.c_ushort), ("yes", ctypes.c_ubyte), ("no", ctypes.c_ubyte), ("k", ctypes.c_uint))


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.POINTER(_Instruction)))


def _install_filter() -> None:
    """Stop this thread, and those that it starts, at the calls of `CALLS`; opening for reading goes on."""
    load, equal, any_of, end = 0x20, 0x15, 0x45, 0x06
    argument = 16  # offset of the first argument; each takes eight bytes
    program: list[tuple[int, int, int, int]] = [(load, 0, 0, 0)]
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
    for number, (name, *_) in _BY_NUMBER.items():
        if position := FLAGS_OF_OPEN.get(name):
            program += [
                (equal, 0, 4, number),
                (load, 0, 0, argument + 8 * position),
                (any_of, 0, 1, writing),
                (end, 0, 0, _TRACE),
                (end, 0, 0, _ALLOW),
            ]
        else:
            program += [(equal, 0, 1, number), (end, 0, 0, _TRACE)]
    program.append((end, 0, 0, _ALLOW))
    instructions = (_Instruction * len(program))(*(_Instruction(*line) for line in program))
    for arguments in (
        (_NO_NEW_PRIVILEGES, 1, 0, 0, 0),
        (_SET_SECCOMP, _FILTER, ctypes.byref(_Program(len(program), instructions)), 0, 0),
    ):
        if _libc.prctl(*arguments):
            raise OSError(ctypes.get_errno(), "prctl")
