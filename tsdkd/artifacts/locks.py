"""Locks on artifacts: one run writes, several processes read, and no run replaces an artifact that is being read.

A writer locks the hidden file `.lock` in the directory. A reader shares a lock on the directory itself, which needs no
permission to write there. A lock ends with its process.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import IO, Any

from tsdkd.artifacts.files import LOCK_FILE
from tsdkd.errors import ArtifactError

_inputs: ContextVar[dict[Path, int | None] | None] = ContextVar("inputs", default=None)
"""The inputs of the running stage, as absolute paths, with the descriptors that hold their locks."""


@contextmanager
def reading_inputs() -> Iterator[None]:
    """Lock every directory that `register_input` names until the stage ends; also a decorator of stages."""
    inputs: dict[Path, int | None] = {}
    token = _inputs.set(inputs)
    try:
        yield
    finally:
        _inputs.reset(token)
        for descriptor in inputs.values():
            if descriptor is not None:
                os.close(descriptor)


def register_input(path: Path) -> None:
    """Register a file or directory as an input of the running stage; a directory is locked until the stage ends."""
    inputs, absolute = _inputs.get(), absolute_path(path)
    if inputs is not None and absolute not in inputs and absolute.exists():
        inputs[absolute] = _lock_directory(absolute) if absolute.is_dir() else None


def absolute_path(path: Path) -> Path:
    """The absolute path without `..`; symbolic links stay."""
    return Path(os.path.normpath(path.absolute()))


def registered_inputs() -> list[Path]:
    """The inputs of the running stage so far, as absolute paths."""
    return list(_inputs.get() or ())


def _lock_directory(path: Path) -> int | None:
    """A descriptor that holds a shared lock; None for a file system without locks and for an unreadable directory."""
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
def without_readers(path: Path) -> Iterator[None]:
    """Wait until no process reads the artifact, and make new readers wait."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def has_readers(path: Path) -> bool:
    """Whether a process reads the artifact."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return not try_lock(descriptor, fcntl.LOCK_EX)
    finally:
        os.close(descriptor)


def lock_for_writing(path: Path) -> IO[str]:
    """Lock the file `.lock` of a directory.

    Raises ArtifactError while another process writes there.
    """
    file = path / LOCK_FILE
    if file.is_symlink() or (file.exists() and not file.is_file()):  # a file of another artifact, or an endless wait
        file.unlink()
    while True:
        lock = file.open("a")
        taken = try_lock(lock, fcntl.LOCK_EX)
        if taken and _is_current(path, lock):
            return lock
        lock.close()
        if not taken:
            raise ArtifactError(
                f"Another process is writing {path}.", "Wait for it, or choose another output directory."
            )


def _is_current(path: Path, lock: IO[str]) -> bool:
    try:
        return os.path.samestat(os.fstat(lock.fileno()), (path / LOCK_FILE).stat())
    except FileNotFoundError:
        return False


def is_locked(path: Path) -> bool:
    """Whether a process is writing the artifact."""
    if not (path / LOCK_FILE).is_file():  # opening a FIFO would wait for its writer
        return False
    with (path / LOCK_FILE).open() as lock:
        return not try_lock(lock, fcntl.LOCK_EX)


def try_lock(file: IO[Any] | int, operation: int) -> bool:
    """Take a lock; False if another process holds it."""
    try:
        fcntl.flock(file, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
