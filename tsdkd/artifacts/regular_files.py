"""Refuses FIFOs, sockets and devices as input files: reading one may never return."""

import os
import stat
from pathlib import Path

from tsdkd.errors import InputError

MAX_TEXT = 1 << 24
"""Bytes of the longest file that a person writes: options, a plan."""
_KINDS = {
    stat.S_IFDIR: "directory",
    stat.S_IFIFO: "FIFO",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
}


def require_regular_file(
    path: Path, what: str = "file", largest: int | None = None, if_missing: str = "Check the path."
) -> None:
    """Raises InputError unless `path` is a regular file, or a link to one, of at most `largest` bytes.

    `what`: its name in the message; `if_missing`: the remedy where it does not exist.
    """
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"The {what} {path} does not exist.", if_missing) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"The {what} {path} cannot be read ({reason}).", "Check the path.") from None
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "special file")
        raise InputError(f"{path} is a {kind}, not a regular file.", "Write its content to a file, and name that.")
    if largest is not None and status.st_size > largest:
        raise InputError(f"The {what} {path} has more than {largest:,} bytes.", "Check that it is the right file.")


def require_regular_files(directory: Path) -> None:
    """Raises InputError for a FIFO, socket or device below a directory, and for a directory that cannot be listed."""

    def fail(error: OSError) -> None:
        raise InputError(f"{error.filename} cannot be listed ({error.strerror}).", "Correct its permissions.")

    for parent, _, names in os.walk(directory, onerror=fail):
        for path in (Path(parent, name) for name in names):
            if path.exists() and not path.is_file():
                require_regular_file(path)
