"""Replacing a finished artifact: the new one is written aside, and takes the place of the old one when it is complete.

The new artifact of `checkpoint` is written to `.checkpoint.tsdkd-new` beside it. Both directories then exchange their
names in one step of the file system, and the old one is deleted. `REPLACEMENT_FILE` marks the directory that is to take
the other's place, so after a kill nobody mistakes the old artifact for the new one.

Without that step (NFS, some network and FUSE file systems), the old directory is renamed to `.checkpoint.tsdkd-old` and
the new one to its name. `restore_missing` ends such a replacement that was killed between the two.
"""

import ctypes
import errno
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Literal

from tsdkd.artifacts.files import JOURNAL_FILE, LOCK_FILE, MANIFEST_FILE, REPLACEMENT_FILE

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_NO_EXCHANGE = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}
_NEW, _OLD = ".tsdkd-new", ".tsdkd-old"
Purpose = Literal["replacement", "extension"]


def aside_path(path: Path) -> Path:
    """The directory in which a new artifact is written while `path` holds a finished one. `path` is resolved."""
    return path.with_name(f".{path.name}{_NEW}")


def _discarded_path(path: Path) -> Path:
    return path.with_name(f".{path.name}{_OLD}")


def artifact_name(path: Path) -> str:
    """The name of an artifact's directory, also while it is written aside."""
    name = path.resolve().name
    return name[1 : -len(_NEW)] if name.startswith(".") and name.endswith(_NEW) else name


def purpose_of(path: Path) -> Purpose | None:
    """What a directory is written aside for; None for any other directory."""
    with suppress(FileNotFoundError):
        return "extension" if (path / REPLACEMENT_FILE).read_text() == "extension" else "replacement"
    return None


def unfinished_extension(path: Path) -> Path | None:
    """The directory in which a complete artifact was being extended when the run ended early."""
    aside = aside_path(path.resolve())
    return aside if purpose_of(aside) == "extension" and (aside / MANIFEST_FILE).is_file() else None


def make_aside(aside: Path, purpose: Purpose, artifact: Path) -> None:
    """Make the directory; an extension shares the files of the artifact, by hard links where the disk has them."""
    aside.mkdir()
    (aside / REPLACEMENT_FILE).write_text(purpose)
    if purpose == "extension":
        others = shutil.ignore_patterns(LOCK_FILE, MANIFEST_FILE, "*.tmp")
        shutil.copytree(artifact, aside, symlinks=True, ignore=others, copy_function=_link_or_copy, dirs_exist_ok=True)


def _link_or_copy(source: str, target: str) -> None:
    if Path(source).name != JOURNAL_FILE:  # which grows in place
        with suppress(OSError):
            return os.link(source, target, follow_symlinks=False)
    shutil.copy2(source, target, follow_symlinks=False)
    return None


def exchange(new: Path, old: Path) -> None:
    """Give the replacement `new` the name of the artifact `old`, and delete the old artifact."""
    discarded = new
    if not _exchange_names(new, old):
        discarded = _discarded_path(old)
        old.rename(discarded)
        with suppress(FileNotFoundError):  # a reader has ended the replacement
            new.rename(old)
    (old / REPLACEMENT_FILE).unlink(missing_ok=True)
    _fsync_directory(old.parent)
    shutil.rmtree(discarded, ignore_errors=True)  # what stays is deleted by the next writer


def _exchange_names(one: Path, other: Path) -> bool:
    """Exchange two directories in one step; False where the system or the file system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))


def restore_missing(path: Path) -> None:
    """End a replacement that was killed between its two renames, which left no directory at `path`."""
    if path.exists():
        return
    target = path.resolve()
    for candidate in (aside_path(target), _discarded_path(target)):
        if _discarded_path(target).is_dir() and candidate.is_dir():
            with suppress(OSError):  # another process does the same, or this one may not
                candidate.rename(target)
                return


def delete_leftovers(path: Path) -> None:
    """Delete what a killed replacement of the artifact at `path` has left. The caller holds the lock."""
    (path / REPLACEMENT_FILE).unlink(missing_ok=True)
    for leftover in (aside_path(path), _discarded_path(path)):
        if os.path.lexists(leftover) and purpose_of(leftover) is None:
            delete(leftover)


def delete(path: Path) -> None:
    """Delete a file or a directory; a symbolic link is deleted, not its target."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _fsync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
