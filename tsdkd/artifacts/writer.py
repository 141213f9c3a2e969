"""Writing an artifact part by part; a kill at any moment leaves every listed part complete.

A part is written under a temporary name, fsynced, renamed and then listed by replacing the manifest atomically. Several
ranks can write one artifact: the first opens it, the others join, and each claims parts that no rank has claimed.
"""

import fcntl
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from tsdkd.artifacts.disk import default_mode, disk_failure, fsync, translate_disk_errors
from tsdkd.artifacts.hashing import file_digest
from tsdkd.artifacts.locks import WriteLock, has_readers, lock_for_writing, try_lock, without_readers
from tsdkd.artifacts.manifest import Manifest, Part, load_manifest, save_manifest
from tsdkd.artifacts.opening import READ_ONLY, OpenDirectory, has_no_part, open_directory, remove_empty
from tsdkd.artifacts.reader import Artifact
from tsdkd.artifacts.replacing import delete_temporary_files, exchange
from tsdkd.artifacts.schemas import schema_of


class Writer:
    """Writes one artifact part by part; a context manager that holds the lock of the artifact.

    One process holds the lock exclusively, or the ranks of one run share it. A rank locks the directory itself while it
    lists a part.
    """

    def __init__(self, output: Path, opened: OpenDirectory) -> None:
        self.output = output
        """The artifact's directory."""
        self.path = opened.path
        """The directory that is written: `output`, or the pending directory that replaces it in `finish`."""
        self.manifest = opened.manifest
        self._opened = opened
        self._claims: dict[str, IO[bytes]] = {}

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

    @classmethod
    def join(cls, path: Path) -> Self:
        """Open the directory (`writer.path`) that another rank of the same run writes and shares."""
        manifest = load_manifest(path)
        locks: tuple[WriteLock, ...] = ()
        try:
            locks = (lock_for_writing(path, fcntl.LOCK_SH),)
        except OSError as error:
            if error.errno not in READ_ONLY or manifest.state != "complete":
                raise
        return cls(path, OpenDirectory(path, manifest, locks))

    def share(self) -> None:
        """Let the other ranks of the run join."""
        for lock in self._opened.locks[-1:]:  # a complete artifact on a read-only disk has none
            try_lock(lock, fcntl.LOCK_SH)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None = None, error: BaseException | None = None, *_: object) -> None:
        """Release the locks. After a failure, delete files that are no parts yet, and a directory without a part.

        Raises TsdkdError for a disk error.
        """
        failure = error and disk_failure(error, self.path)
        if error and self._opened.locks:
            self._delete_unfinished()
        for claim in self._claims.values():
            claim.close()
        for lock in self._opened.locks:
            lock.close()
        if failure:
            raise failure from error

    def _delete_unfinished(self) -> None:
        with suppress(OSError):  # the error that ends the run matters more
            for file in self._claims:
                self.temporary_path(file).unlink(missing_ok=True)
                self._claim_path(file).unlink(missing_ok=True)
            if try_lock(self._opened.locks[-1], fcntl.LOCK_EX):  # no other rank writes
                delete_temporary_files(self.path)
                if self._is_empty:
                    shutil.rmtree(self.path.resolve())
                    remove_empty(self._opened.made)

    @property
    def complete(self) -> bool:
        return self.manifest.state == "complete"

    def has(self, file: str) -> bool:
        return any(part.file == file for part in self.manifest.parts)

    def claim(self, file: str) -> bool:
        """Claim a part that is neither listed nor claimed by another rank; False if it is."""
        with self._locked_manifest():
            if self.has(file):
                return False
            claim = self._claim_path(file).open("ab")
            if not try_lock(claim, fcntl.LOCK_EX):
                claim.close()
                return False
            self._claims[file] = claim
            return True

    def write_table(self, file: str, table: pa.Table) -> None:
        """Add a Parquet part; the table is cast to the schema of the kind, with its optional columns."""
        part = TableWriter(self, file, table.column_names)
        part.write(table)
        part.close()

    def temporary_path(self, file: str) -> Path:
        """The path to write a file to before `add_file` makes it a part."""
        return self.path / f"{file}.tmp"

    def _claim_path(self, file: str) -> Path:
        """The file that is locked while a rank writes a part; a library that replaces the part would lose its lock."""
        return self.path / f"{file}.claim.tmp"

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
        if claim := self._claims.pop(file, None):
            self._claim_path(file).unlink()
            claim.close()

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
        """Complete the artifact with the parts that all ranks have listed, and replace an older one.

        The replacement waits while other processes read the older one; `notify` receives a message about the wait.
        """
        self.manifest = load_manifest(self.path)
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
        """Lock the directory, and read the manifest that other ranks may have changed."""
        directory = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(directory, fcntl.LOCK_EX)
            self.manifest = load_manifest(self.path)
            yield
        finally:
            os.close(directory)


class TableWriter:
    """Writes a Parquet part in pieces, one row group each; `close` makes it a part of the artifact."""

    def __init__(self, writer: Writer, file: str, optional: Collection[str] = ()) -> None:
        """`optional`: the names of optional columns to write; others among them have no effect."""
        self._writer, self._file, self._rows = writer, file, 0
        self._schema = schema_of(writer.manifest.kind, optional)
        self._parquet = pq.ParquetWriter(
            writer.temporary_path(file), self._schema, compression="zstd", use_dictionary=False
        )

    def write(self, table: pa.Table) -> None:
        """Write one row group; the table is cast to the schema of the kind."""
        self._parquet.write_table(table.cast(self._schema))
        self._rows += table.num_rows

    def close(self) -> None:
        self._parquet.close()
        self._writer.add_file(self._file, self._rows)
