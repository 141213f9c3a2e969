"""Errors of the disk: full, over quota, a file too large, or broken. Libraries report them in many ways."""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from tsdkd.errors import TsdkdError, first_line

DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
_REASONS = "|".join(re.escape(os.strerror(code)) for code in sorted(DISK_ERRORS))
_TORCH_WRITER = re.compile(r"inline_container|PytorchStreamWriter")


def disk_failure(error: BaseException, directory: Path) -> TsdkdError | None:
    """What to tell the user if an error of the disk is the cause, directly or of an earlier error; else None.

    `directory`: where the run writes.
    """
    if not isinstance(error, Exception) or isinstance(error, TsdkdError):
        return None
    for cause in _chain(error):
        if reason := _reason(cause):
            file = getattr(cause, "filename", None) or directory
            return TsdkdError(
                f"{file} could not be written ({reason}); {_format_free(directory)} free.",
                "Free space, or choose a directory on another disk, and run the same command again: it continues "
                "from what is complete.",
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


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and the errors that it came from."""
    seen: list[BaseException] = []
    while error not in seen:
        seen.append(error)
        yield error
        error = error.__cause__ or error.__context__ or error


def _reason(error: BaseException) -> str | None:
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return os.strerror(error.errno)
    if found := re.search(_REASONS, str(error)):
        return found.group()
    return f"torch: {first_line(error)}" if _TORCH_WRITER.search(str(error)) else None


def _format_free(directory: Path) -> str:
    existing = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    return f"{shutil.disk_usage(existing).free / 1e9:,.1f} GB"
