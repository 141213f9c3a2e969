"""Confines the calling process for good: limits, a filter of system calls (seccomp), a filter of files (Landlock).

seccomp, through libseccomp, drops every system call that a computation does not need. The process cannot open a
socket, start a process or thread, send a signal, or open a file for writing. Landlock, where the kernel has it, hides
all files but Python's own and the system's libraries. Neither needs privileges.
"""

import ctypes
import os
import resource
import signal
import sys
from pathlib import Path

MEMORY_BYTES = 1 << 30
OPEN_FILES = 32
NOT_CONFINED = 97
"""The exit status of a process that could not confine itself."""

ALLOWED_SYSTEM_CALLS = """
    access brk clock_getres clock_gettime clock_nanosleep close dup epoll_create1 epoll_ctl epoll_pwait epoll_pwait2
    epoll_wait eventfd2 exit exit_group faccessat faccessat2 fstat fstatfs futex get_robust_list getcwd getdents
    getdents64 getegid geteuid getgid getpeername getpgrp getpid getppid getrandom getresgid getresuid getrlimit
    getrusage getsid getsockname gettid gettimeofday getuid lseek lstat madvise mincore mmap mprotect mremap munmap
    nanosleep newfstatat pause pipe pipe2 poll ppoll pread64 preadv pselect6 read readlink readlinkat readv recvfrom
    restart_syscall rseq rt_sigaction rt_sigpending rt_sigprocmask rt_sigreturn rt_sigsuspend rt_sigtimedwait
    sched_getaffinity sched_yield select set_robust_list set_tid_address setitimer shutdown sigaltstack stat statfs
    statx sysinfo time times uname write writev"""
"""All other system calls are refused, except `open` and `openat` for reading and those below."""
ALLOWED_REQUESTS = {"fcntl": (0, 1, 2, 3, 1030), "ioctl": (0x5401, 0x5421, 0x5450, 0x5451)}
"""The requests that Python itself makes: duplicate a descriptor, flags, close on exec, blocking, is this a terminal.
Others could send signals or type into a terminal."""
WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
ALLOW, REFUSE = 0x7FFF0000, 0x00050000 | 1
"""Actions of libseccomp; 1 is EPERM."""
EQUAL_WHEN_MASKED = 7
"""libseccomp's SCMP_CMP_MASKED_EQ."""
WHOLE = 0xFFFFFFFFFFFFFFFF
AF_UNIX = SOCK_STREAM = 1
SOCKET_TYPE = 0xF

READABLE_FILES = (
    "/usr", "/lib", "/lib64", "/nix/store", "/etc/ld.so.cache", "/etc/localtime", "/dev/null", "/dev/urandom",
)  # fmt: skip
"""What Landlock leaves besides Python's own directories."""
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446
"""System calls, the same on all architectures."""
LANDLOCK_VERSION, PATH_RULE = 1, 1
READ_FILE, READ_DIRECTORY, ALL_ACCESS = 1 << 2, 1 << 3, (1 << 13) - 1
"""Access rights of Landlock's first version; rights that no rule names are refused."""
SET_PARENT_DEATH_SIGNAL, SET_DUMPABLE, SET_NO_NEW_PRIVILEGES = 1, 4, 38
"""Options of prctl."""

_libc = ctypes.CDLL(None, use_errno=True)


def end_with(parent: int) -> None:
    """Let the kernel kill this process when its parent ends, also if the parent ended before the call."""
    _checked("prctl", _libc.prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0))
    if os.getppid() != parent:
        os._exit(1)


def hide_memory() -> None:
    """Keep other processes of the same user from reading this process's memory and descriptors."""
    _checked("prctl", _libc.prctl(SET_DUMPABLE, 0, 0, 0, 0))


def has_landlock() -> bool:
    return bool(_libc.syscall(LANDLOCK_CREATE, None, 0, LANDLOCK_VERSION) > 0)


class Confinement:
    """The filters, built once and entered by several processes. Raises OSError when the machine lacks libseccomp."""

    def __init__(self, cpu_seconds: int) -> None:
        self.cpu_seconds = cpu_seconds
        self.library = ctypes.CDLL("libseccomp.so.2", use_errno=True)
        self.library.seccomp_init.restype = ctypes.c_void_p
        self.rules = ctypes.c_void_p(self.library.seccomp_init(ctypes.c_uint32(REFUSE)))
        for name in ALLOWED_SYSTEM_CALLS.split():
            self._allow(name)
        for name, flags in (("open", 1), ("openat", 2)):
            self._allow(name, _equal(flags, 0, WRITE_FLAGS))
        for name, requests in ALLOWED_REQUESTS.items():
            for request in requests:
                self._allow(name, _equal(1, request, 0xFFFFFFFF))
        self._allow("socketpair", _equal(0, AF_UNIX), _equal(1, SOCK_STREAM, SOCKET_TYPE))  # asyncio's own
        self._allow("sendto", _equal(4, 0))  # without an address
        self.landlock = _landlock_rules() if has_landlock() else None

    def enter(self) -> None:
        """Set the limits, then the filters; none can be undone. Raises OSError."""
        for limit, value in (
            (resource.RLIMIT_CPU, self.cpu_seconds),
            (resource.RLIMIT_AS, MEMORY_BYTES),
            (resource.RLIMIT_NOFILE, OPEN_FILES),
            (resource.RLIMIT_FSIZE, 0),
            (resource.RLIMIT_CORE, 0),
        ):
            resource.setrlimit(limit, (value, value))
        _drop_capabilities()
        _checked("prctl", _libc.prctl(SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0))
        if self.landlock is not None:
            _checked("landlock_restrict_self", _libc.syscall(LANDLOCK_RESTRICT, self.landlock, 0))
            os.close(self.landlock)
        if self.library.seccomp_load(self.rules):
            raise OSError(ctypes.get_errno(), "seccomp_load")

    def _allow(self, name: str, *comparisons: "_ArgumentComparison") -> None:
        number = self.library.seccomp_syscall_resolve_name(name.encode())
        if number < 0:  # this architecture has no such call
            return
        array = (_ArgumentComparison * len(comparisons))(*comparisons)
        if self.library.seccomp_rule_add_array(self.rules, ctypes.c_uint32(ALLOW), number, len(comparisons), array):
            raise OSError(f"libseccomp refuses the rule for {name}")


class _ArgumentComparison(ctypes.Structure):
    """libseccomp's scmp_arg_cmp, for comparisons with a mask."""

    _fields_ = (
        ("argument", ctypes.c_uint),
        ("operator", ctypes.c_int),
        ("mask", ctypes.c_uint64),
        ("value", ctypes.c_uint64),
    )


class _PathRule(ctypes.Structure):
    """landlock_path_beneath_attr."""

    _pack_ = 1
    _fields_ = (("access", ctypes.c_uint64), ("descriptor", ctypes.c_int32))


def _equal(argument: int, value: int, mask: int = WHOLE) -> _ArgumentComparison:
    return _ArgumentComparison(argument, EQUAL_WHEN_MASKED, mask, value)


def _landlock_rules() -> int:
    handled = ctypes.c_uint64(ALL_ACCESS)
    rules = _checked("landlock_create_ruleset", _libc.syscall(LANDLOCK_CREATE, ctypes.byref(handled), 8, 0))
    for path in {sys.prefix, sys.base_prefix, sys.exec_prefix, *READABLE_FILES}:
        if not Path(path).exists():
            continue
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        access = READ_FILE | READ_DIRECTORY if Path(path).is_dir() else READ_FILE
        rule = _PathRule(access, descriptor)
        _checked("landlock_add_rule", _libc.syscall(LANDLOCK_ADD, rules, PATH_RULE, ctypes.byref(rule), 0))
        os.close(descriptor)
    return rules


def _drop_capabilities() -> None:
    """A program of root's cannot read what the user could not read without privileges."""
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    _checked("capset", _libc.capset(header, none))


def _checked(name: str, result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), name)
    return result
