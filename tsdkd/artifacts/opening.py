"""Opening an artifact for writing: start, resume, extend or replace it, and in which directory.

A new or partial artifact is written in its own directory. A replacement or an extension of a complete artifact is
written in a pending directory (replacing.py), so the old artifact stays complete until the new one is.
"""

import errno
import shutil
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from tsdkd.artifacts.file_system import file_system_error, require_file_operations, require_local_path, sync_names
from tsdkd.artifacts.files import MANIFEST_FILE, NO_PARTS
from tsdkd.artifacts.identity import describe_differences, differ_in
from tsdkd.artifacts.locks import (
    WriteLock,
    is_locked,
    lock_for_writing,
)
from tsdkd.artifacts.manifest import Manifest, load_manifest, save_manifest
from tsdkd.artifacts.reader import check_parts
from tsdkd.artifacts.refusals import (
    require_artifact,
    require_kind,
    require_other_inputs,
    require_own_files,
    require_replaceable,
)
from tsdkd.artifacts.replacing import (
    Purpose,
    delete,
    delete_leftovers,
    delete_temporary_files,
    exchange,
    make_pending,
    pending_path,
    purpose_of,
    require_renaming,
    restore_missing,
)
from tsdkd.errors import ArtifactError

READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}


@dataclass(frozen=True)
class OpenDirectory:
    """A directory that is open for writing, with its manifest."""

    path: Path
    manifest: Manifest
    locks: tuple[WriteLock, ...] = ()
    inherited: frozenset[str] = frozenset()
    """Names of the files that an extension shares with the artifact that it extends."""
    made: tuple[Path, ...] = ()
    """The directories that this run made, innermost first."""


def open_directory(path: Path, wanted: Manifest, overwrite: bool, may_differ: Collection[str]) -> OpenDirectory:
    """Choose, lock and prepare the directory that a run writes; see `Writer.open`."""
    require_local_path(path)
    restore_missing(path)
    require_artifact(path)
    require_other_inputs(path, wanted, overwrite)
    made = _make_directory(path.resolve())
    try:
        lock = lock_for_writing(path)
    except OSError as error:
        if error.errno in READ_ONLY and not overwrite and (existing := _find_complete(path, wanted, may_differ)):
            return OpenDirectory(path, existing)
        raise
    except ArtifactError:
        remove_empty(made)
        raise
    with _closed_on_failure(lock, made=made):
        if not is_locked(path):
            raise file_system_error(path, "grants an exclusive lock twice")
        require_file_operations(path)
        delete_leftovers(path.resolve())
        opened = _choose(path, wanted, overwrite, may_differ)
        if opened.manifest.state == "partial":
            with _closed_on_failure(*opened.locks):
                require_own_files(opened.path)
    return replace(opened, locks=(lock, *opened.locks), made=made)


def _make_directory(path: Path) -> tuple[Path, ...]:
    """Make a directory and its missing parents. Returns those that it made, innermost first."""
    made = tuple(directory for directory in (path, *path.parents) if not directory.exists())
    try:
        path.mkdir(parents=True, exist_ok=True)
        for directory in made:
            sync_names(directory.parent)
    except (OSError, ArtifactError):
        remove_empty(made)
        raise
    return made


def remove_empty(directories: Iterable[Path]) -> None:
    """Remove directories, innermost first, up to one that is not empty."""
    with suppress(OSError):
        for directory in directories:
            with suppress(FileNotFoundError):
                directory.rmdir()


def _find_complete(path: Path, wanted: Manifest, may_differ: Collection[str]) -> Manifest | None:
    """The complete artifact of the same run in a directory that cannot be written to; else None."""
    if not (path / MANIFEST_FILE).is_file():
        return None
    existing = load_manifest(path)
    same = not describe_differences(existing, wanted) and not differ_in(existing, wanted, may_differ)
    if existing.state != "complete" or not same:
        return None
    check_parts(path, existing)
    return existing


@contextmanager
def _closed_on_failure(*locks: WriteLock, made: tuple[Path, ...] = ()) -> Iterator[None]:
    """When an error ends the block, close locks (the error keeps their frame) and remove the directories `made`."""
    try:
        yield
    except BaseException:
        if made:
            shutil.rmtree(made[0], ignore_errors=True)
            remove_empty(made)
        for lock in locks:
            lock.close()
        raise


def find_continued(path: Path, wanted: Manifest, overwrite: bool, may_differ: Collection[str] = ()) -> Manifest | None:
    """The artifact that a run would continue, or find complete, whatever day it records; None: the run would begin one.

    Arguments as for `Writer.open`.
    """
    pending = pending_path(path.resolve())
    for directory, continues in (
        (path, True),
        (pending, purpose_of(pending) in {"replacement", not overwrite and "extension"}),
    ):
        with suppress(ArtifactError):
            existing = load_manifest(directory)
            if overwrite and directory == path and existing.state == "complete":
                continue
            if continues and not describe_differences(existing, replace(wanted, day=existing.day), may_differ):
                return existing
    return None


def has_no_part(path: Path, inherited: Collection[str] = ()) -> bool:
    """Whether a run has written neither a part nor a saved step to a directory."""
    names = {file.name for file in path.glob("*") if file.suffix != ".tmp"}  # none where the directory was removed
    return not names - NO_PARTS - {*inherited}


def _choose(path: Path, wanted: Manifest, overwrite: bool, may_differ: Collection[str]) -> OpenDirectory:
    if not (path / MANIFEST_FILE).exists():
        return _begin(path, wanted)
    if overwrite:
        require_kind(path, wanted)
        return (
            _resume_partial(path, wanted)
            or _resume_pending(path, wanted, "replacement")
            or _begin_pending(path, wanted, "replacement")
        )
    existing = load_manifest(path)
    if existing.state == "partial" and has_no_part(path):
        return _begin(path, wanted)
    if differing := describe_differences(existing, wanted, may_differ):
        if pending := _resume_any_pending(path, wanted, may_differ):
            return pending
        raise ArtifactError(
            f"{path} was made with another configuration: {'; '.join(differing)}.",
            "Choose another directory (--run, or the option of the artifact), or replace it with --overwrite.",
        )
    if existing.state == "complete" and differ_in(existing, wanted, may_differ):
        check_parts(path, existing)
        pending = _resume_any_pending(path, wanted, may_differ)
        return pending or _begin_pending(path, replace(wanted, parts=existing.parts), "extension")
    return _resume(path, existing, wanted, may_differ)


def _begin(path: Path, wanted: Manifest) -> OpenDirectory:
    delete_temporary_files(path)
    save_manifest(path, wanted)
    return OpenDirectory(path, wanted)


def _resume(path: Path, existing: Manifest, wanted: Manifest, may_differ: Collection[str] = ()) -> OpenDirectory:
    """Raises ArtifactError for a damaged part."""
    delete_temporary_files(path)
    check_parts(path, existing)
    if differ_in(existing, wanted, may_differ):
        existing = replace(wanted, parts=existing.parts)
        save_manifest(path, existing)
    return OpenDirectory(path, existing)


def _resume_partial(path: Path, wanted: Manifest) -> OpenDirectory | None:
    """Resume a partial artifact of the same identity, or start again if it has no part; None for any other."""
    with suppress(ArtifactError):
        existing = load_manifest(path)
        if existing.state == "partial":
            if has_no_part(path):
                return _begin(path, wanted)
            if not describe_differences(existing, wanted):
                return _resume(path, existing, wanted)
    return None


def _resume_any_pending(path: Path, wanted: Manifest, may_differ: Collection[str]) -> OpenDirectory | None:
    return _resume_pending(path, wanted, "replacement") or _resume_pending(path, wanted, "extension", may_differ)


def _resume_pending(
    path: Path, wanted: Manifest, purpose: Purpose, may_differ: Collection[str] = ()
) -> OpenDirectory | None:
    """Resume a pending directory of this purpose and identity, and exchange a complete one; None for any other."""
    pending = pending_path(path.resolve())
    if purpose_of(pending) != purpose:
        return None
    lock, opened = lock_for_writing(pending), None
    with suppress(ArtifactError):
        existing = load_manifest(pending)
        if not describe_differences(existing, wanted, may_differ):
            opened = _resume(pending, existing, wanted, may_differ)
    if opened is None:
        lock.close()
        return None
    with _closed_on_failure(lock):
        require_replaceable(path)
        if opened.manifest.state == "complete":
            exchange(pending, path.resolve())
            opened = OpenDirectory(path, opened.manifest)
    return replace(opened, locks=(lock,))


def _begin_pending(path: Path, manifest: Manifest, purpose: Purpose) -> OpenDirectory:
    require_replaceable(path)
    pending = pending_path(path.resolve())
    if pending.exists():
        with lock_for_writing(pending):
            delete(pending)
    require_renaming(path.resolve())
    make_pending(pending, purpose, path)
    inherited = frozenset(file.name for file in pending.iterdir())
    lock = lock_for_writing(pending)
    with _closed_on_failure(lock):
        save_manifest(pending, manifest)
    return OpenDirectory(pending, manifest, (lock,), inherited)
