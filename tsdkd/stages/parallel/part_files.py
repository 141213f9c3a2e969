"""Parts that workers write: into the artifact's directory if they see it; otherwise they send the bytes to the driver.

The driver alone writes the manifest. It checks each part's hash, gives the part its name, and lists it.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from tsdkd.artifacts.hashing import file_digest
from tsdkd.artifacts.writer import Writer
from tsdkd.errors import TsdkdError


@dataclass(frozen=True, slots=True)
class WrittenPart:
    """A part that a worker wrote."""

    file: str
    rows: int | None
    """None for a file that is no table."""
    sha256: str
    process: int
    name: str | None
    """Of the temporary file in the artifact's directory; None: `content` holds the part."""
    content: Any = None
    """Bytes, as an array that Ray transfers without copies."""


@dataclass(frozen=True, slots=True)
class PartDestination:
    """Where workers write parts. Each attempt has a file of its own, so that a lost worker disturbs no other."""

    directory: Path
    marker: str
    """A file of the directory that only this run has: who sees it sees this directory."""

    def new_path(self) -> Path:
        """A path for a part."""
        name = f"{uuid4().hex}.tmp"
        return self.directory / name if self.is_visible else Path(tempfile.gettempdir()) / f"tsdkd-{name}"

    @property
    def is_visible(self) -> bool:
        """Whether this process sees the directory."""
        return (self.directory / self.marker).is_file()

    def deliver(self, file: str, path: Path, rows: int | None = None) -> WrittenPart:
        """The part at `path`, as the driver receives it."""
        digest, process = file_digest(path), os.getpid()
        if path.parent == self.directory:
            return WrittenPart(file, rows, digest, process, path.name)
        content = np.fromfile(path, dtype=np.uint8)
        path.unlink()
        return WrittenPart(file, rows, digest, process, None, content)


@contextmanager
def open_destination(writer: Writer) -> Iterator[PartDestination]:
    """The destination of the parts of an artifact."""
    directory = writer.path.absolute()
    marker = directory / f"{uuid4().hex}.marker.tmp"
    marker.touch()
    try:
        yield PartDestination(directory, marker.name)
    finally:
        marker.unlink(missing_ok=True)


def add_part(writer: Writer, part: WrittenPart) -> None:
    """List a part. Raises TsdkdError for a file of another process that arrived damaged."""
    path = writer.temporary_path(part.file)
    if part.name is None:
        part.content.tofile(path)
    else:
        (writer.path / part.name).replace(path)
    if part.process != os.getpid() and file_digest(path) != part.sha256:
        path.unlink()
        raise TsdkdError(
            f"The part {part.file} arrived with another hash than its worker computed.",
            "Run the same command again; if it fails again, check the file system that the nodes share.",
        )
    writer.add_file(part.file, part.rows, part.sha256)
