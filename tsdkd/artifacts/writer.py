"""Writing an artifact: one finished part after the other, killed at any moment without harm.

A part is written aside, fsynced and renamed, and only then listed, by replacing the manifest atomically. Several
processes can write one artifact: the first opens it, the others join, each claims parts that nobody has.
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

from tsdkd.artifacts.hashing import file_digest
from tsdkd.artifacts.manifest import (
    JOURNAL_FILE,
    LOCK_FILE,
    MANIFEST_FILE,
    Manifest,
    Part,
    load_manifest,
    read_raw_manifest,
)
from tsdkd.artifacts.reader import Artifact, check_parts
from tsdkd.artifacts.schemas import SCHEMAS
from tsdkd.errors import ArtifactError, TsdkdError


class Writer:
    """Writes one artifact, part by part; as a context it holds the directory's lock.

    One process holds it exclusively, or the processes of one run share it. The directory itself is locked for the
    moment in which one of them lists a part.
    """

    def __init__(self, path: Path, manifest: Manifest, lock: IO[str]) -> None:
        self.path = path
        self.manifest = manifest
        self._lock = lock
        self._claims: dict[str, IO[bytes]] = {}

    @classmethod
    def open(cls, path: Path, manifest: Manifest, *, overwrite: bool = False, grows: Collection[str] = ()) -> Self:
        """Begin an artifact, resume a partial one, or find a complete one (`writer.complete`).

        `grows`: what of the identity may be otherwise in an artifact that is there, which is then gone on with.

        Raises ArtifactError when something else is there: no artifact, another identity, or another process writing.
        """
        begun = {LOCK_FILE, f"{MANIFEST_FILE}.tmp"}  # all that a stage killed at its very start leaves
        if path.exists() and not (path / MANIFEST_FILE).exists() and {file.name for file in path.iterdir()} - begun:
            raise ArtifactError(f"{path} exists and is no artifact.", "Choose another output directory.")
        inputs = [path / parent.path for parent in manifest.parents] + [Path(model.name) for model in manifest.models]
        if any(place.exists() and place.resolve() == path.resolve() for place in inputs):
            raise ArtifactError(f"{path} is both input and output.", "Choose another output directory.")
        path.mkdir(parents=True, exist_ok=True)
        writer = cls(path, manifest, (path / LOCK_FILE).open("w"))
        try:
            writer._hold(fcntl.LOCK_EX)
            writer._take_over(overwrite, grows)
        except BaseException:
            writer._lock.close()
            raise
        return writer

    @classmethod
    def join(cls, path: Path) -> Self:
        """Help another process of the same run, which opened the artifact and shares it."""
        writer = cls(path, load_manifest(path), (path / LOCK_FILE).open("w"))
        writer._hold(fcntl.LOCK_SH)
        return writer

    def share(self) -> None:
        """Let other processes join."""
        self._hold(fcntl.LOCK_SH)

    def _hold(self, lock: int) -> None:
        if not _locked(self._lock, lock):
            self._lock.close()
            raise ArtifactError(
                f"Another process is writing {self.path}.", "Wait for it, or choose another output directory."
            )

    def _take_over(self, overwrite: bool, grows: Collection[str]) -> None:
        if not (self.path / MANIFEST_FILE).exists():
            return self._save()
        if overwrite:
            self._clear()
            return self._save()
        found = load_manifest(self.path)
        bare = found.state == "partial" and self._is_bare  # begun, but nothing is in it yet
        grown = any(_plain(found).get(key) != _plain(self.manifest).get(key) for key in grows)
        if not bare:
            if grown:
                found = replace(found, state="partial", summary={})
            _require_same(self.path, found, self.manifest, grows)
        for stray in self.path.glob("*.tmp"):
            _remove(stray)
        if bare:
            return self._save()
        check_parts(self.path, found)
        if grown:
            self.manifest = replace(self.manifest, parts=found.parts)
            return self._save()
        self.manifest = found
        return None

    def _clear(self) -> None:
        """Remove all but the manifest, which goes last: cut off here, the rest is still known for what it was."""
        kind = read_raw_manifest(self.path).get("kind")
        if kind != self.manifest.kind:
            raise ArtifactError(
                f"{self.path} holds {kind}, not {self.manifest.kind}.",
                "Choose another output directory, or remove it yourself.",
            )
        for file in self.path.iterdir():
            if file.name not in {LOCK_FILE, MANIFEST_FILE}:
                _remove(file)

    @property
    def _is_bare(self) -> bool:
        return all(
            file.name in {MANIFEST_FILE, LOCK_FILE, JOURNAL_FILE} or file.suffix == ".tmp"
            for file in self.path.iterdir()
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None = None, *_: object) -> None:
        """Free the lock; a stage that failed before it had anything to keep leaves nothing behind."""
        for claim in self._claims.values():
            claim.close()
        if error and not self.complete and self._is_bare and _locked(self._lock, fcntl.LOCK_EX):  # nobody else is here
            shutil.rmtree(self.path)
        self._lock.close()

    @property
    def complete(self) -> bool:
        return self.manifest.state == "complete"

    def has(self, file: str) -> bool:
        return any(part.file == file for part in self.manifest.parts)

    def claim(self, file: str) -> bool:
        """Take a part that is not there yet and that no other process of this run has taken."""
        with self._listing():
            if self.has(file):
                return False
            claim = self._claim_path(file).open("ab")
            if not _locked(claim, fcntl.LOCK_EX):
                claim.close()
                return False
            self._claims[file] = claim
            return True

    def write_table(self, file: str, table: pa.Table) -> None:
        """Add a Parquet part; the table is cast to the kind's schema."""
        part = TableWriter(self, file)
        part.write(table)
        part.close()

    def aside(self, file: str) -> Path:
        """Where to write a file that `add_file` will then make a part."""
        return self.path / f"{file}.tmp"

    def _claim_path(self, file: str) -> Path:
        """Locked while one process makes a part; a lock on the part itself would be lost when a library replaces it."""
        return self.path / f"{file}.claim.tmp"

    def add_file(self, file: str, rows: int | None = None) -> None:
        """Make what was written aside a part; `rows` where it is a table."""
        aside = self.aside(file)
        aside.chmod(0o666 & ~_umask())  # safetensors lets only the owner read
        _fsync(aside)
        part = Part(file, rows, aside.stat().st_size, file_digest(aside))
        with self._listing():
            aside.replace(self.path / file)
            others = tuple(other for other in self.manifest.parts if other.file != file)
            self.manifest = replace(self.manifest, parts=(*others, part))
            self._save()
        if claim := self._claims.pop(file, None):
            self._claim_path(file).unlink()
            claim.close()

    def adopt(self, directory: Path) -> None:
        """Make every file of a directory a part; `directory` is emptied."""
        for source in sorted(file for file in directory.rglob("*") if file.is_file()):
            name = str(source.relative_to(directory))
            self.aside(name).parent.mkdir(exist_ok=True, parents=True)
            source.replace(self.aside(name))
            self.add_file(name)

    def finish(self, summary: dict[str, Any]) -> Artifact:
        """Seal the artifact, with all that any process has listed."""
        self.manifest = load_manifest(self.path)
        parts = tuple(sorted(self.manifest.parts, key=lambda part: part.file))
        self.manifest = replace(self.manifest, state="complete", summary=summary, parts=parts)
        self._save()
        return self.artifact

    @property
    def artifact(self) -> Artifact:
        return Artifact(self.path, self.manifest)

    @contextmanager
    def _listing(self) -> Iterator[None]:
        """Alone with the manifest as it is now."""
        directory = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(directory, fcntl.LOCK_EX)
            self.manifest = load_manifest(self.path)
            yield
        finally:
            os.close(directory)

    def _save(self) -> None:
        aside = self.aside(MANIFEST_FILE)
        aside.write_text(json.dumps(asdict(self.manifest), indent=1, sort_keys=True) + "\n")
        _fsync(aside)
        aside.replace(self.path / MANIFEST_FILE)
        _fsync(self.path)


class TableWriter:
    """A Parquet part on its way: pieces are written aside as they come, one row group each, and `close` lists it."""

    def __init__(self, writer: Writer, file: str) -> None:
        self._writer, self._file, self._rows = writer, file, 0
        self._schema = SCHEMAS[writer.manifest.kind]
        self._parquet = pq.ParquetWriter(writer.aside(file), self._schema, compression="zstd", use_dictionary=False)

    def write(self, table: pa.Table) -> None:
        """The table is cast to the kind's schema."""
        self._parquet.write_table(table.cast(self._schema))
        self._rows += table.num_rows

    def close(self) -> None:
        self._parquet.close()
        self._writer.add_file(self._file, self._rows)


def is_locked(path: Path) -> bool:
    """Is some process writing the artifact?"""
    if not (path / LOCK_FILE).exists():
        return False
    with (path / LOCK_FILE).open() as lock:
        return not _locked(lock, fcntl.LOCK_EX)


def _require_same(path: Path, found: Manifest, wanted: Manifest, grows: Collection[str]) -> None:
    was, now = _plain(found), _plain(wanted)
    differing = [
        f"{key} was {_brief(was.get(key))}, now {_brief(now.get(key))}"
        for key in sorted(was.keys() | now.keys())
        if was.get(key) != now.get(key) and key not in grows
    ]
    versions = [{"tsdkd": manifest.tsdkd, **manifest.libraries} for manifest in (found, wanted)]
    if found.state == "partial" and versions[0] != versions[1]:
        differing.append(f"versions were {versions[0]}, now {versions[1]}")
    if differing:
        raise ArtifactError(
            f"{path} was made with another configuration: {'; '.join(differing)}.",
            "Choose another place for it (--run, or its own option), or give --overwrite to replace it.",
        )


def _plain(manifest: Manifest) -> dict[str, Any]:
    """An identity as it comes back from a file."""
    identity: dict[str, Any] = json.loads(json.dumps(manifest.identity))
    return identity


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def _brief(value: Any) -> str:
    def short(item: Any) -> Any:
        return f"{item[:12]}…" if isinstance(item, str) and len(item) == 64 else item

    return str([short(item) for item in value] if isinstance(value, list) else short(value))


def _locked(file: IO[Any], lock: int) -> bool:
    """Take a lock, or say that another process has it."""
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
            f"{path} could not be written to disk ({error.strerror}).", "Check the disk and run again."
        ) from error
    finally:
        os.close(handle)
