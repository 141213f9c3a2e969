"""Errors of the disk: full, over quota, a file too large, or broken. Libraries report them in many ways."""

import errno
import os
import re
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tsdkd.errors import TsdkdError

DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
_REASONS = "|".join(re.escape(os.strerror(code)) for code in sorted(DISK_ERRORS))
INCOMPLETE = "the file is incomplete"
_TORCH_WRITER = re.compile(r"inline_container|PytorchStreamWriter|iostream error")
"""Error messages of torch.save, which do not name the cause."""


@contextmanager
def translate_disk_errors(directory: Path) -> Iterator[None]:
    """Raise TsdkdError for a disk error of the writes inside, which go to `directory`."""
    try:
        yield
    except Exception as error:
        if failure := disk_failure(error, directory):
            raise failure from error
        raise


def disk_failure(error: BaseException, directory: Path | None = None) -> TsdkdError | None:
    """The message for the user if a disk error is among the causes of `error`; else None.

    `directory`: where the run writes, for an error that names no file.
    """
    if not isinstance(error, Exception) or isinstance(error, TsdkdError):
        return None
    for cause in causes(error):
        if reason := _reason(cause):
            file = getattr(cause, "filename", None) or directory
            verb = "read or written" if reason == os.strerror(errno.EIO) else "written"
            free = f"; its disk has {_format_free(Path(file))} free" if file else ""
            return TsdkdError(
                f"{file or 'A file'} could not be {verb} ({reason}){free}.",
                f"{_remedy(reason)}, then run the same command again; complete parts are kept.",
            )
    return None


def fsync(path: Path) -> None:
    """Wait until a file or the names in a directory are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        os.close(descriptor)


def default_mode() -> int:
    """The permissions of a new file."""
    mask = os.umask(0o022)
    os.umask(mask)
    return 0o666 & ~mask


def replace_text(path: Path, text: str) -> None:
    """Replace a text file in one step: whenever the process ends, the old or the new text is there as a whole."""
    temporary = temporary_path(path)
    temporary.unlink(missing_ok=True)  # a link would lead elsewhere, and a FIFO would wait for its reader
    try:
        temporary.write_text(text, encoding="utf-8")
        fsync(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync(path.parent)


def temporary_path(path: Path) -> Path:
    """The file that `replace_text` writes before it renames it."""
    return path.with_name(f"{path.name}.tmp")


def causes(error: BaseException) -> Iterator[BaseException]:
    """An error and its causes."""
    seen: list[BaseException] = []
    while error not in seen:
        seen.append(error)
        yield error
        error = error.__cause__ or error.__context__ or error


def _reason(error: BaseException) -> str | None:
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return os.strerror(error.errno)
    if match := re.search(_REASONS, str(error)):
        return match.group()
    return INCOMPLETE if _TORCH_WRITER.search(str(error)) else None


def _remedy(reason: str) -> str:
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if limit != resource.RLIM_INFINITY and reason in {os.strerror(errno.EFBIG), INCOMPLETE}:
        return f"Raise this process's limit of {limit:,} bytes a file (`ulimit -f`)"
    if reason == os.strerror(errno.EFBIG):
        return "Write to a file system that holds larger files"
    return "Free space or check the disk"


def _format_free(path: Path) -> str:
    existing = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    return f"{shutil.disk_usage(existing).free / 1e9:,.1f} GB"
