"""Replacing a complete artifact by a new one, which is written in a pending directory until it is complete.

The pending directory of `checkpoint` is `.checkpoint.tsdkd-new` beside it. When it is complete, both directories
exchange their names in one step of the file system, and the old one is deleted. `REPLACEMENT_FILE` marks the pending
directory, so the old artifact is not taken for the new one after a kill.

Without such a step (NFS, some network and FUSE file systems), the old directory is renamed to `.checkpoint.tsdkd-old`
and the pending one to `checkpoint`. `restore_missing` finishes a replacement that was killed between the two renames.
"""

import ctypes
import errno
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Literal

from tsdkd.artifacts.disk import fsync
from tsdkd.artifacts.file_system import require_result, required_operation
from tsdkd.artifacts.files import JOURNAL_FILE, LOCK_FILE, MANIFEST_FILE, REPLACEMENT_FILE
from tsdkd.artifacts.locks import lock_for_writing
from tsdkd.artifacts.manifest import load_manifest
from tsdkd.errors import ArtifactError

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_NO_EXCHANGE = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOTEMPTY, errno.EEXIST}
"""Errors of a file system that cannot exchange names; for the last two, it tried a plain renaming."""
_NEW, _OLD = ".tsdkd-new", ".tsdkd-old"
SAVED_STEPS = "resume"
"""The directory of the steps that training saves; a complete checkpoint has none."""
Purpose = Literal["replacement", "extension"]


def pending_path(path: Path) -> Path:
    """The pending directory of the artifact at `path`, a resolved path."""
    return path.with_name(f".{path.name}{_NEW}")


def _discarded_path(path: Path) -> Path:
    return path.with_name(f".{path.name}{_OLD}")


def artifact_name(path: Path) -> str:
    """The name of an artifact's directory, also for its pending directory."""
    name = path.resolve().name
    return name[1 : -len(_NEW)] if name.startswith(".") and name.endswith(_NEW) else name


def purpose_of(path: Path) -> Purpose | None:
    """The purpose of a pending directory; None for any other directory."""
    with suppress(FileNotFoundError):
        return "extension" if (path / REPLACEMENT_FILE).read_text() == "extension" else "replacement"
    return None


def unfinished_extension(path: Path) -> Path | None:
    """The pending directory of an interrupted extension; None without one."""
    pending = pending_path(path.resolve())
    return pending if purpose_of(pending) == "extension" and (pending / MANIFEST_FILE).is_file() else None


def require_renaming(path: Path) -> None:
    """Try to rename a directory beside the artifact at `path`, a resolved path. Raises ArtifactError.

    Its names are those of leftovers, so that a kill leaves nothing.
    """
    one, two = pending_path(path), _discarded_path(path)
    try:
        with required_operation(path.parent, "rename a directory with an open file"):
            one.mkdir()
            with (one / JOURNAL_FILE).open("ab", buffering=0) as journal:
                journal.write(b"a")
                one.rename(two)
                journal.write(b"b")
            require_result((two / JOURNAL_FILE).read_bytes() == b"ab" and not one.exists())
    finally:
        for directory in (one, two):
            shutil.rmtree(directory, ignore_errors=True)


def make_pending(pending: Path, purpose: Purpose, artifact: Path) -> None:
    """Make a pending directory. An extension starts with the artifact's files, as hard links where possible."""
    pending.mkdir()
    (pending / REPLACEMENT_FILE).write_text(purpose)
    fsync(pending / REPLACEMENT_FILE)
    if purpose == "extension":
        others = shutil.ignore_patterns(LOCK_FILE, MANIFEST_FILE, "*.tmp")
        shutil.copytree(
            artifact, pending, symlinks=True, ignore=others, copy_function=_link_or_copy, dirs_exist_ok=True
        )


def _link_or_copy(source: str, target: str) -> None:
    if Path(source).name != JOURNAL_FILE:  # its file grows
        with suppress(OSError):
            return os.link(source, target, follow_symlinks=False)
    shutil.copy2(source, target, follow_symlinks=False)
    if not Path(target).is_symlink():
        fsync(Path(target))
    return None


def exchange(new: Path, old: Path) -> None:
    """Give the replacement `new` the name of the artifact `old`, and delete the old artifact."""
    discarded = new
    if not _exchange_names(new, old):
        discarded = _discarded_path(old)
        old.rename(discarded)
        with suppress(FileNotFoundError):  # a reader has finished the replacement
            new.rename(old)
    (old / REPLACEMENT_FILE).unlink(missing_ok=True)
    fsync(old.parent)
    shutil.rmtree(discarded, ignore_errors=True)  # the next writer deletes what remains


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
    """Finish a replacement that was killed between its two renames and left no directory at `path`."""
    if path.exists():
        return
    target = path.resolve()
    for candidate in (pending_path(target), _discarded_path(target)):
        if _discarded_path(target).is_dir() and candidate.is_dir():
            with suppress(OSError):  # another process was faster, or this one has no permission
                candidate.rename(target)
                return


def delete_leftovers(path: Path) -> None:
    """Delete the files that a killed run left beside or in the artifact at `path`. The caller holds the lock."""
    for leftover in _leftovers(path):
        delete(leftover)


def delete_unused_leftovers(path: Path) -> None:
    """Delete the leftovers of an artifact if no process writes it and permissions allow it."""
    path = path.resolve()
    if _leftovers(path):
        with suppress(OSError, ArtifactError), lock_for_writing(path):
            delete_leftovers(path)


def _leftovers(path: Path) -> list[Path]:
    replaced = [other for other in (pending_path(path), _discarded_path(path)) if purpose_of(other) is None]
    marks = [] if artifact_name(path) != path.name else [path / REPLACEMENT_FILE]  # a pending directory needs its own
    found = [file for file in (*marks, *replaced) if os.path.lexists(file)]
    steps = path / SAVED_STEPS
    with suppress(ArtifactError):
        manifest = load_manifest(path) if steps.is_dir() else None
        if manifest and (manifest.kind, manifest.state) == ("checkpoint", "complete"):
            found.append(steps)
    return found


def delete_temporary_files(path: Path) -> None:
    """Delete files and directories that no run has renamed to parts. The caller holds the lock."""
    for temporary in path.glob("*.tmp"):
        delete(temporary)


def delete(path: Path) -> None:
    """Delete a file or a directory; a symbolic link is deleted, not its target."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
