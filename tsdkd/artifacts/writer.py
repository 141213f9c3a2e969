"""Writing an artifact part by part; a kill at any moment leaves every listed part complete.

A part is written under a temporary name, fsynced, renamed and then listed by replacing the manifest atomically. Several
ranks can write one artifact: the first opens it, the others join, and each claims parts that no rank has claimed.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from tsdkd.artifacts.files import CONFIG_FILE, JOURNAL_FILE, LOCK_FILE, MANIFEST_FILE
from tsdkd.artifacts.hashing import file_digest
from tsdkd.artifacts.manifest import Manifest, Part, load_manifest, read_raw_manifest
from tsdkd.artifacts.reader import Artifact, check_parts
from tsdkd.artifacts.schemas import SCHEMAS
from tsdkd.errors import ArtifactError, TsdkdError


class Writer:
    """Writes one artifact part by part; a context manager that holds the lock of the artifact.

    One process holds the lock exclusively, or the ranks of one run share it. A rank locks the directory itself while it
    lists a part.
    """

    def __init__(self, path: Path, manifest: Manifest, lock: IO[str]) -> None:
        self.path = path
        self.manifest = manifest
        self._lock = lock
        self._claims: dict[str, IO[bytes]] = {}

    @classmethod
    def open(cls, path: Path, manifest: Manifest, *, overwrite: bool = False, may_differ: Collection[str] = ()) -> Self:
        """Start an artifact, resume a partial one, or open a complete one (`writer.complete`).

        may_differ: keys of the identity that may differ from an existing artifact, which is then extended.

        Raises ArtifactError where `path` is not an artifact, has another identity, or is being written by a process.
        """
        begun = {LOCK_FILE, f"{MANIFEST_FILE}.tmp"}  # the files that a stage killed at its start leaves
        if path.exists() and not (path / MANIFEST_FILE).exists() and {file.name for file in path.iterdir()} - begun:
            raise ArtifactError(f"{path} exists and is not an artifact.", "Choose another output directory.")
        inputs = [path / parent.path for parent in manifest.parents] + [Path(model.name) for model in manifest.models]
        if any(source.exists() and source.resolve() == path.resolve() for source in inputs):
            raise ArtifactError(f"{path} is an input and the output.", "Choose another output directory.")
        path.mkdir(parents=True, exist_ok=True)
        writer = cls(path, manifest, (path / LOCK_FILE).open("w"))
        try:
            writer._acquire(fcntl.LOCK_EX)
            writer._start(overwrite, may_differ)
        except BaseException:
            writer._lock.close()
            raise
        return writer

    @classmethod
    def join(cls, path: Path) -> Self:
        """Open an artifact that another rank of the same run has opened and shares."""
        writer = cls(path, load_manifest(path), (path / LOCK_FILE).open("w"))
        writer._acquire(fcntl.LOCK_SH)
        return writer

    def share(self) -> None:
        """Let the other ranks of the run join."""
        self._acquire(fcntl.LOCK_SH)

    def _acquire(self, lock: int) -> None:
        if not _try_lock(self._lock, lock):
            self._lock.close()
            raise ArtifactError(
                f"Another process is writing {self.path}.", "Wait for it, or choose another output directory."
            )

    def _start(self, overwrite: bool, may_differ: Collection[str]) -> None:
        if not (self.path / MANIFEST_FILE).exists():
            return self._save()
        if overwrite:
            self._clear()
            return self._save()
        existing = load_manifest(self.path)
        empty = existing.state == "partial" and self._is_empty  # started, without a part
        before, after = _identity_as_json(existing), _identity_as_json(self.manifest)
        extended = any(before.get(key) != after.get(key) for key in may_differ)
        if not empty:
            if extended:
                existing = replace(existing, state="partial", summary={})
            _require_same_identity(self.path, existing, self.manifest, may_differ)
        for temporary in self.path.glob("*.tmp"):
            _remove(temporary)
        if empty:
            return self._save()
        check_parts(self.path, existing)
        if extended:
            self.manifest = replace(self.manifest, parts=existing.parts)
            return self._save()
        self.manifest = existing
        return None

    def _clear(self) -> None:
        """Remove every file but the manifest, which keeps the directory an artifact until it is replaced."""
        kind = read_raw_manifest(self.path).get("kind")
        if kind != self.manifest.kind:
            raise ArtifactError(
                f"{self.path} holds {kind}, not {self.manifest.kind}.",
                "Choose another output directory, or remove this one.",
            )
        for file in self.path.iterdir():
            if file.name not in {LOCK_FILE, MANIFEST_FILE}:
                _remove(file)

    @property
    def _is_empty(self) -> bool:
        return all(
            file.name in {MANIFEST_FILE, LOCK_FILE, JOURNAL_FILE, CONFIG_FILE} or file.suffix == ".tmp"
            for file in self.path.iterdir()
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None = None, *_: object) -> None:
        """Release the lock; an artifact that failed without a part is removed."""
        for claim in self._claims.values():
            claim.close()
        if error and not self.complete and self._is_empty and _try_lock(self._lock, fcntl.LOCK_EX):
            shutil.rmtree(self.path)
        self._lock.close()

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
            if not _try_lock(claim, fcntl.LOCK_EX):
                claim.close()
                return False
            self._claims[file] = claim
            return True

    def write_table(self, file: str, table: pa.Table) -> None:
        """Add a Parquet part; the table is cast to the schema of the kind."""
        part = TableWriter(self, file)
        part.write(table)
        part.close()

    def temporary_path(self, file: str) -> Path:
        """The path to write a file to before `add_file` makes it a part."""
        return self.path / f"{file}.tmp"

    def _claim_path(self, file: str) -> Path:
        """The file that is locked while a rank writes a part; a library that replaces the part would lose its lock."""
        return self.path / f"{file}.claim.tmp"

    def add_file(self, file: str, rows: int | None = None) -> None:
        """Make a part of the file at `temporary_path(file)`; `rows` if it is a table."""
        temporary = self.temporary_path(file)
        temporary.chmod(0o666 & ~_umask())  # safetensors writes files that only their owner can read
        _fsync(temporary)
        part = Part(file, rows, temporary.stat().st_size, file_digest(temporary))
        with self._locked_manifest():
            temporary.replace(self.path / file)
            others = tuple(other for other in self.manifest.parts if other.file != file)
            self.manifest = replace(self.manifest, parts=(*others, part))
            self._save()
        if claim := self._claims.pop(file, None):
            self._claim_path(file).unlink()
            claim.close()

    def add_directory(self, directory: Path) -> None:
        """Move every file of a directory into the artifact as a part."""
        for source in sorted(file for file in directory.rglob("*") if file.is_file()):
            name = str(source.relative_to(directory))
            self.temporary_path(name).parent.mkdir(exist_ok=True, parents=True)
            source.replace(self.temporary_path(name))
            self.add_file(name)

    def finish(self, summary: dict[str, Any]) -> Artifact:
        """Complete the artifact with the parts that all ranks have listed."""
        self.manifest = load_manifest(self.path)
        parts = tuple(sorted(self.manifest.parts, key=lambda part: part.file))
        self.manifest = replace(self.manifest, state="complete", summary=summary, parts=parts)
        self._save()
        return self.artifact

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

    def _save(self) -> None:
        temporary = self.temporary_path(MANIFEST_FILE)
        temporary.write_text(json.dumps(asdict(self.manifest), indent=1, sort_keys=True) + "\n")
        _fsync(temporary)
        temporary.replace(self.path / MANIFEST_FILE)
        _fsync(self.path)


class TableWriter:
    """Writes a Parquet part in pieces, one row group each; `close` makes it a part of the artifact."""

    def __init__(self, writer: Writer, file: str) -> None:
        self._writer, self._file, self._rows = writer, file, 0
        self._schema = SCHEMAS[writer.manifest.kind]
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


def is_locked(path: Path) -> bool:
    """Whether a process is writing the artifact."""
    if not (path / LOCK_FILE).exists():
        return False
    with (path / LOCK_FILE).open() as lock:
        return not _try_lock(lock, fcntl.LOCK_EX)


def _require_same_identity(path: Path, existing: Manifest, wanted: Manifest, may_differ: Collection[str]) -> None:
    before, after = _identity_as_json(existing), _identity_as_json(wanted)
    differing = [
        f"{key} was {_abbreviated(before.get(key))}, now {_abbreviated(after.get(key))}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and key not in may_differ
    ]
    versions = [{"tsdkd": manifest.tsdkd, **manifest.libraries} for manifest in (existing, wanted)]
    if existing.state == "partial" and versions[0] != versions[1]:
        differing.append(f"versions were {versions[0]}, now {versions[1]}")
    if differing:
        raise ArtifactError(
            f"{path} was made with another configuration: {'; '.join(differing)}.",
            "Choose another directory (--run, or the option of the artifact), or replace it with --overwrite.",
        )


def _identity_as_json(manifest: Manifest) -> dict[str, Any]:
    """The identity with the types that JSON returns."""
    identity: dict[str, Any] = json.loads(json.dumps(manifest.identity))
    return identity


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def _abbreviated(value: Any) -> str:
    def short(item: Any) -> Any:
        return f"{item[:12]}…" if isinstance(item, str) and len(item) == 64 else item

    return str([short(item) for item in value] if isinstance(value, list) else short(value))


def _try_lock(file: IO[Any], lock: int) -> bool:
    """Take a lock; False if another process holds it."""
    try:
        fcntl.flock(file, lock | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        raise TsdkdError(
            f"{path} could not be written to disk ({error.strerror}).", "Check the disk, and run the command again."
        ) from error
    finally:
        os.close(handle)
