"""Locks on artifacts: one run writes, several processes read, and no run replaces an artifact that is being read.

A writer locks the hidden file `.lock` in the directory, and names itself in it. A reader shares a lock on the directory
and one on its manifest, which needs no permission to write there; network file systems keep locks on directories within
one host. A lock ends with its process, and with its host once the file server notices the loss.
"""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tsdkd.artifacts.file_system import file_system_error, locks_reach_other_hosts, required_operation
from tsdkd.artifacts.files import LOCK_FILE, MANIFEST_FILE
from tsdkd.errors import ArtifactError

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_ATTEMPTS = 100
"""Attempts to lock a file that other processes replace at the same time."""
_MAX_HOLDER = 1000
"""Bytes of a lock file that are read at most."""
_inputs: ContextVar[dict[Path, list[int]] | None] = ContextVar("inputs", default=None)
"""The inputs of the running stage, as absolute paths, with the descriptors that hold their locks."""


@contextmanager
def reading_inputs() -> Iterator[None]:
    """Lock every directory that `register_input` names until the stage ends; also a decorator of stages."""
    inputs: dict[Path, list[int]] = {}
    token = _inputs.set(inputs)
    try:
        yield
    finally:
        _inputs.reset(token)
        for descriptors in inputs.values():
            for descriptor in descriptors:
                os.close(descriptor)


def register_input(path: Path) -> None:
    """Register a file or directory as an input of the running stage; a directory is locked until the stage ends."""
    inputs, absolute = _inputs.get(), absolute_path(path)
    if inputs is not None and absolute not in inputs and absolute.exists():
        inputs[absolute] = _lock_for_reading(absolute) if absolute.is_dir() else []


def absolute_path(path: Path) -> Path:
    """The absolute path without `..`; symbolic links stay."""
    return Path(os.path.normpath(path.absolute()))


def registered_inputs() -> list[Path]:
    """The inputs of the running stage so far, as absolute paths."""
    return list(_inputs.get() or ())


def _lock_for_reading(directory: Path) -> list[int]:
    """Descriptors that hold shared locks on a directory and on its manifest, if it has one."""
    locked = (_lock_shared(path) for path in _locked_by_readers(directory))
    return [descriptor for descriptor in locked if descriptor is not None]


def _locked_by_readers(directory: Path) -> Iterator[Path]:
    yield directory
    if (directory / MANIFEST_FILE).is_file():
        yield directory / MANIFEST_FILE


def _lock_shared(path: Path) -> int | None:
    """A descriptor that holds a shared lock.

    None for an unreadable path, and for a file system without locks, on which no artifact is written or replaced.
    """
    while True:
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)  # waits while a writer lists a part or replaces the artifact
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except OSError:
            os.close(descriptor)
            return None
        os.close(descriptor)  # replaced meanwhile


@contextmanager
def without_readers(directory: Path) -> Iterator[None]:
    """Wait until no process reads the artifact, and make new readers wait."""
    with ExitStack() as stack:
        for path in _locked_by_readers(directory):
            fcntl.flock(stack.enter_context(_opened_to_lock(path)), fcntl.LOCK_EX)
        yield


def has_readers(directory: Path) -> bool:
    """Whether a process reads the artifact."""
    return any(_is_taken(path) for path in _locked_by_readers(directory))


def _is_taken(path: Path) -> bool:
    with _opened_to_lock(path) as descriptor:
        return not try_lock(descriptor)


@contextmanager
def _opened_to_lock(path: Path) -> Iterator[int]:
    """A descriptor for exclusive locks, which NFS grants on files that are open for writing."""
    writable = path.is_file() and os.access(path, os.W_OK)
    descriptor = os.open(path, os.O_RDWR if writable else os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@dataclass(frozen=True, slots=True)
class Holder:
    """The process that writes an artifact, as its lock file names it."""

    process: int
    boot: str
    """The boot id of its kernel, which differs between hosts; "" if the system has none."""
    host: str

    @classmethod
    def own(cls) -> Self:
        boot = _BOOT_ID.read_text().strip() if _BOOT_ID.is_file() else ""
        return cls(os.getpid(), boot, socket.gethostname())

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """None for a text that `__str__` does not write, such as that of a lock that was released."""
        words = text.split()
        return cls(int(words[0]), words[1].strip("-"), words[2]) if len(words) == 3 and words[0].isdecimal() else None

    @property
    def is_here(self) -> bool:
        """Whether the process runs, or ran, on this host: its lock is then free only if it has ended."""
        own = Holder.own()
        return self.host == own.host or (self.boot != "" and self.boot == own.boot)

    def __str__(self) -> str:
        return f"{self.process} {self.boot or '-'} {self.host}\n"


def read_holder(directory: Path) -> Holder | None:
    """The process that holds, or held until it was killed, the lock of a directory."""
    try:
        with (directory / LOCK_FILE).open("rb") as file:
            return Holder.parse(file.read(_MAX_HOLDER).decode(errors="replace"))
    except OSError:
        return None


class WriteLock:
    """The open lock file of a directory; a context manager that releases the lock."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._path = directory / LOCK_FILE
        self._is_new = False
        with suppress(FileExistsError):
            self._path.touch(exist_ok=False)
            self._is_new = True
        self._file = self._path.open("a+b", buffering=0)
        self._signed = False

    def fileno(self) -> int:
        return self._file.fileno()

    def sign(self) -> None:
        """Name this process in the file until the lock is released, unless the disk is full. Raises ArtifactError."""
        self._signed = True
        with suppress(OSError), required_operation(self._directory, "write a file to disk"):
            self._file.truncate(0)
            self._file.write(str(Holder.own()).encode())
            os.fsync(self._file)

    def close(self) -> None:
        with suppress(OSError, ValueError):  # ValueError: it was closed before
            if self._signed:
                self._file.truncate(0)
        self._file.close()

    def discard(self) -> None:
        """Close the file, and delete it if it is new: another process may hold the lock of an older one."""
        self.close()
        if self._is_new:
            self._path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def lock_for_writing(path: Path) -> WriteLock:
    """Lock the file `.lock` of a directory.

    Raises ArtifactError while another process writes there, and for a file system without locks.
    """
    file = path / LOCK_FILE
    if file.is_symlink() or (file.exists() and not file.is_file()):  # a file of another artifact, or an endless wait
        file.unlink()
    for _ in range(_ATTEMPTS):
        lock = WriteLock(path)
        try:
            taken = try_lock(lock)
        except OSError as error:
            lock.discard()
            raise file_system_error(path, f"cannot lock a file ({error.strerror})") from None
        if taken and _is_current(path, lock):
            break
        lock.close()
        if not taken:
            holder = read_holder(path)
            by = f" (process {holder.process} on {holder.host})" if holder else ""
            raise ArtifactError(
                f"Another process is writing {path}{by}.", "Wait for it, or choose another output directory."
            )
    else:
        file.unlink(missing_ok=True)
        raise file_system_error(path, "cannot keep the inode number of a file")
    _require_no_other_host(path, lock)
    try:
        lock.sign()
    except ArtifactError:
        lock.discard()
        raise
    return lock


def _require_no_other_host(path: Path, lock: WriteLock) -> None:
    """Raises ArtifactError if a process of another host may write, whose lock this host would not see."""
    holder = read_holder(path)
    if holder and not holder.is_here and not locks_reach_other_hosts(path):
        lock.close()
        raise ArtifactError(
            f"Process {holder.process} on {holder.host} may be writing {path}: "
            "on this file system, its lock may be invisible to this host.",
            f"If that process has ended, delete {path / LOCK_FILE}.",
        )


def _is_current(path: Path, lock: WriteLock) -> bool:
    try:
        return os.path.samestat(os.fstat(lock.fileno()), (path / LOCK_FILE).stat())
    except FileNotFoundError:
        return False


def is_locked(path: Path) -> bool:
    """Whether a process is writing the artifact; never where the file system has no locks."""
    if not (path / LOCK_FILE).is_file():  # opening a FIFO would wait for its writer
        return False
    with suppress(OSError):
        return _is_taken(path / LOCK_FILE)
    return False


def try_lock(file: WriteLock | int) -> bool:
    """Take an exclusive lock; False if another process holds it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
