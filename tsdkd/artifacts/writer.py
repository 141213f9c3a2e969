"""Writing an artifact part by part; a kill at any moment leaves every listed part complete.

A part is written under a temporary name, fsynced, renamed and then listed by replacing the manifest atomically. One
process writes an artifact: workers hand their parts to it.
"""

import fcntl
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from tsdkd.artifacts.disk import default_mode, disk_failure, fsync, translate_disk_errors
from tsdkd.artifacts.hashing import file_digest
from tsdkd.artifacts.locks import has_readers, without_readers
from tsdkd.artifacts.manifest import ArtifactKind, Manifest, Part, load_manifest, save_manifest
from tsdkd.artifacts.opening import OpenDirectory, has_no_part, open_directory, remove_empty
from tsdkd.artifacts.reader import Artifact
from tsdkd.artifacts.replacing import delete_temporary_files, exchange
from tsdkd.artifacts.schemas import schema_of


class Writer:
    """Writes one artifact part by part; a context manager that holds the lock of the artifact.

    It locks the directory itself while it lists a part, so that readers see it before or after.
    """

    def __init__(self, output: Path, opened: OpenDirectory) -> None:
        self.output = output
        """The artifact's directory."""
        self.path = opened.path
        """The directory that is written: `output`, or the pending directory that replaces it in `finish`."""
        self.manifest = opened.manifest
        self._opened = opened

    @classmethod
    def open(cls, path: Path, manifest: Manifest, *, overwrite: bool = False, may_differ: Collection[str] = ()) -> Self:
        """Start an artifact, resume a partial one, or open a complete one (`writer.complete`).

        overwrite: replaces an artifact that is complete or differs, once the new one is complete.
        may_differ: keys of the identity that may differ from an existing artifact, which is then extended.

        Raises ArtifactError if `path` is not an artifact, has another identity or contains an input, and while another
        process writes it or reads an artifact that would be replaced.
        """
        with translate_disk_errors(path):
            return cls(path, open_directory(path, manifest, overwrite, may_differ))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None = None, error: BaseException | None = None, *_: object) -> None:
        """Release the locks. After a failure, delete files that are no parts yet, and a directory without a part.

        Raises TsdkdError for a disk error.
        """
        failure = error and disk_failure(error, self.path)
        if error and self._opened.locks:
            self._delete_unfinished()
        for lock in self._opened.locks:
            lock.close()
        if failure:
            raise failure from error

    def _delete_unfinished(self) -> None:
        with suppress(OSError):  # the error that ends the run matters more
            delete_temporary_files(self.path)
            if self._is_empty:
                shutil.rmtree(self.path.resolve())
                remove_empty(self._opened.made)

    @property
    def complete(self) -> bool:
        return self.manifest.state == "complete"

    def has(self, file: str) -> bool:
        return any(part.file == file for part in self.manifest.parts)

    def write_table(self, file: str, table: pa.Table) -> None:
        """Add a Parquet part; the table is cast to the schema of the kind, with its optional columns."""
        part = TableWriter(self.temporary_path(file), self.manifest.kind, table.column_names)
        part.write(table)
        self.add_file(file, part.close())

    def temporary_path(self, file: str) -> Path:
        """The path to write a file to before `add_file` makes it a part."""
        return self.path / f"{file}.tmp"

    def add_file(self, file: str, rows: int | None = None, sha256: str | None = None) -> None:
        """Make a part of the file at `temporary_path(file)`; `rows` if it is a table.

        `sha256`: its hash, if the caller computed it while it wrote the file.
        """
        temporary = self.temporary_path(file)
        temporary.chmod(default_mode())  # safetensors writes files that only their owner can read
        fsync(temporary)
        part = Part(file, rows, temporary.stat().st_size, sha256 or file_digest(temporary))
        with self._locked_manifest():
            temporary.replace(self.path / file)
            fsync((self.path / file).parent)
            others = tuple(other for other in self.manifest.parts if other.file != file)
            self.manifest = replace(self.manifest, parts=(*others, part))
            save_manifest(self.path, self.manifest)

    def remove(self, parts: Collection[Part]) -> None:
        """Delete parts that do not belong to the artifact."""
        if not parts:
            return
        with self._locked_manifest():
            self.manifest = replace(self.manifest, parts=tuple(p for p in self.manifest.parts if p not in parts))
            save_manifest(self.path, self.manifest)
        for part in parts:
            (self.path / part.file).unlink(missing_ok=True)

    def add_directory(self, directory: Path) -> None:
        """Move every file of a directory into the artifact as a part."""
        for source in sorted(file for file in directory.rglob("*") if file.is_file()):
            name = str(source.relative_to(directory))
            self.temporary_path(name).parent.mkdir(exist_ok=True, parents=True)
            source.replace(self.temporary_path(name))
            self.add_file(name)

    def finish(self, summary: dict[str, Any], notify: Callable[[str], None] = lambda _: None) -> Artifact:
        """Complete the artifact and replace an older one.

        The replacement waits while other processes read the older one; `notify` receives a message about the wait.
        """
        delete_temporary_files(self.path)  # of lost workers
        self.manifest = load_manifest(self.path)  # as readers see it
        parts = tuple(sorted(self.manifest.parts, key=lambda part: part.file))
        self.manifest = replace(self.manifest, state="complete", summary=summary, parts=parts)
        save_manifest(self.path, self.manifest)
        if self.path != self.output:
            if has_readers(self.output):
                notify(f"{self.output} is being read by another process; the new artifact replaces it afterwards.")
            with without_readers(self.output):
                exchange(self.path, self.output.resolve())
            self.path = self.output
        return self.artifact

    @property
    def _is_empty(self) -> bool:
        return not self.complete and has_no_part(self.path, self._opened.inherited)

    @property
    def artifact(self) -> Artifact:
        return Artifact(self.path, self.manifest)

    @contextmanager
    def _locked_manifest(self) -> Iterator[None]:
        """Lock the directory: readers wait."""
        directory = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(directory, fcntl.LOCK_EX)
            yield
        finally:
            os.close(directory)


class TableWriter:
    """Writes a Parquet file of an artifact in pieces, one row group each."""

    def __init__(self, path: Path, kind: ArtifactKind, optional: Collection[str] = ()) -> None:
        """`kind`: the artifact's. `optional`: the names of optional columns to write; others have no effect."""
        self.path, self._rows, self._schema = path, 0, schema_of(kind, optional)
        self._parquet = pq.ParquetWriter(path, self._schema, compression="zstd", use_dictionary=False)

    def write(self, table: pa.Table) -> None:
        """Write one row group; the table is cast to the schema of the kind."""
        self._parquet.write_table(table.cast(self._schema))
        self._rows += table.num_rows

    def close(self) -> int:
        """Complete the file. Returns its number of rows."""
        self._parquet.close()
        return self._rows
