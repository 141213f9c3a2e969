"""Reading an artifact: kind, format, state, sizes, hashes and parents are checked before a stage sees a row.

Of its tables, the columns that a stage reads are checked as it reads them.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tsdkd.artifacts.file_system import require_local_path
from tsdkd.artifacts.files import MANIFEST_FILE
from tsdkd.artifacts.hashing import content_digest, file_digest
from tsdkd.artifacts.journal import read_sessions
from tsdkd.artifacts.locks import reading_inputs, register_input
from tsdkd.artifacts.manifest import (
    HUB_DATASET,
    MADE_BY,
    ArtifactKind,
    Manifest,
    Parent,
    Part,
    load_manifest,
    read_raw_manifest,
    relative_path,
    require_own_hash,
)
from tsdkd.artifacts.replacing import delete_unused_leftovers, restore_missing
from tsdkd.artifacts.schemas import OPTIONAL
from tsdkd.artifacts.tables import check_values, limits_of, open_table, translate_arrow_errors
from tsdkd.errors import ArtifactError

VERIFIED_ROWS = 16
"""Rows in memory while a table is verified; 2,000 tokens of hidden states have 20 MB."""


@dataclass(frozen=True, slots=True)
class Artifact:
    """A complete artifact, opened by `read_artifact`."""

    path: Path
    manifest: Manifest

    @property
    def fingerprint(self) -> str:
        return self.manifest.fingerprint

    @property
    def tables(self) -> list[Part]:
        return [part for part in self.manifest.parts if part.rows is not None]

    def table_part(self, file: str) -> Part:
        """The table with this name. Raises ArtifactError if the artifact lists none."""
        if part := next((part for part in self.tables if part.file == file), None):
            return part
        raise ArtifactError(
            f"{self.path} lists no table {file}.", f"Run `{MADE_BY[self.manifest.kind]}` again with --overwrite."
        )

    @contextmanager
    def open_part(self, part: Part) -> Iterator[pq.ParquetFile]:
        """A table, to read some of its rows, which `check` checks. Raises ArtifactError."""
        with open_table(part_path(self.path, part), self.manifest.kind, part.rows) as file:
            yield file

    def check(self, part: Part, table: pa.Table) -> pa.Table:
        """Rows of a part, when their values are those that this artifact can hold. Raises ArtifactError."""
        file = self.path / part.file
        with translate_arrow_errors(file):
            check_values(file, table, limits_of(self.path, self.manifest, part.file))
        return table

    def read_part(self, part: Part, columns: list[str] | None = None, filters: pc.Expression | None = None) -> pa.Table:
        """Check a part, and read columns of it. An optional column that is missing from the file is filled with nulls.

        `filters`: the rows to return.

        Raises ArtifactError.
        """
        with self.open_part(part) as file:
            present = None if columns is None else [name for name in columns if name in file.schema_arrow.names]
            table = self.check(part, file.read(columns=present))
        for field in OPTIONAL.get(self.manifest.kind, ()):
            if field.name in (columns or ()) and field.name not in table.column_names:
                table = table.append_column(field, pa.nulls(len(table), field.type))
        return table if filters is None else table.filter(filters)

    def table(self, columns: list[str] | None = None) -> pa.Table:
        """All rows, in the order of the parts. A column that parts of earlier versions lack is null there."""
        return pa.concat_tables((self.read_part(part, columns) for part in self.tables), promote_options="default")

    def as_parent_of(self, child: Path) -> Parent:
        return Parent(self.manifest.kind, self.fingerprint, relative_path(self.path, child))

    def require_parent(self, other: "Artifact") -> None:
        """Raise ArtifactError unless this artifact was made from `other`."""
        kind = other.manifest.kind
        recorded = next((parent.fingerprint for parent in self.manifest.parents if parent.kind == kind), "none")
        if recorded != other.fingerprint:
            raise ArtifactError(
                f"{self.path} was made from other {kind} ({recorded[:12]}) than {other.path} "
                f"({other.fingerprint[:12]}).",
                f"Name the {kind} that it was made from, or run `{MADE_BY[self.manifest.kind]}` with --overwrite.",
            )


def read_artifact(path: Path, kind: ArtifactKind, option: str | None = None, *, hashed: bool = True) -> Artifact:
    """Open a complete artifact of one kind; `hashed=False` leaves the hashes of its parts unchecked.

    Raises ArtifactError that names the command to run, or the `option` to give.
    """
    command = MADE_BY[kind]
    restore_missing(path)
    register_input(path)
    if not (path / MANIFEST_FILE).is_file():
        require_local_path(path)
        name = option or f"--{kind}"
        raise ArtifactError(f"Found no {kind} at {path}.", f"Run `{command}` first, or name the {kind} with {name}.")
    manifest = load_manifest(path)
    if manifest.kind != kind:
        raise ArtifactError(f"{path} holds {manifest.kind}, not {kind}.", f"Name an artifact that `{command}` wrote.")
    if manifest.state != "complete":
        raise ArtifactError(
            f"{path} is not finished: {len(manifest.parts)} parts are written.",
            f"Run `{_pulled_by(path) or command}` again to complete it.",
        )
    delete_unused_leftovers(path)
    if kind in {"rollouts", "scores"} and not manifest.rows:
        raise ArtifactError(f"{path} lists no row.", f"Run `{command}` again with --overwrite.")
    if hashed:
        check_parts(path, manifest)
    return Artifact(path, manifest)


def _pulled_by(path: Path) -> str:
    """The command that pulls an unfinished artifact; "" if a stage writes it."""
    with suppress(ArtifactError):
        commands = [session.command for session in read_sessions(path)]
        return commands[-1] if commands and commands[-1].startswith("tsdkd artifact pull ") else ""
    return ""


@reading_inputs()
def verify_artifact(path: Path) -> tuple[Manifest, list[Parent]]:
    """Check an artifact as `read_artifact` does, then all values of its tables, its parents, and the manifest's hash.

    Returns its manifest, and the parents outside its run, which are not hashed. Raises ArtifactError for the first
    difference. A parent that was removed is not a difference.
    """
    manifest = load_manifest(path)
    artifact = read_artifact(path, manifest.kind)
    for part in artifact.tables:
        with artifact.open_part(part) as file:
            for batch in file.iter_batches(VERIFIED_ROWS):
                artifact.check(part, pa.Table.from_batches([batch]))
    outside = []
    for parent, exists, unchanged in check_parents(path, manifest, run_of(path)):
        if unchanged is None and parent.kind != HUB_DATASET:
            outside.append(parent)
        if exists and unchanged is False:
            raise ArtifactError(
                f"{path / parent.path} ({parent.kind}) changed after {path} was made from it.",
                f"Restore it, or run `{MADE_BY[manifest.kind]}` again with --overwrite.",
            )
    require_own_hash(read_raw_manifest(path), path)
    return manifest, outside


def check_parents(path: Path, manifest: Manifest, run: Path) -> Iterator[tuple[Parent, bool, bool | None]]:
    """Yield each parent, whether its path exists, and whether it has the recorded fingerprint; None: not checked.

    A dataset on the hub is not checked. `run`: only files in this directory are hashed, because a manifest may name any
    path; of other artifacts, the manifest alone is read.
    """
    for parent in manifest.parents:
        location = path / parent.path
        if parent.kind == HUB_DATASET:
            yield parent, True, None
        elif parent.kind in MADE_BY:
            exists = _exists(location / MANIFEST_FILE)
            yield parent, exists, exists and load_manifest(location).fingerprint == parent.fingerprint
        elif not _exists(location):
            yield parent, False, False
        elif _lies_inside(location, run):
            yield parent, True, content_digest(location) == parent.fingerprint
        else:
            yield parent, True, None


def run_of(path: Path) -> Path:
    """The run directory of an artifact: the results of each model are one level deeper than other artifacts."""
    parent = path.resolve().parent
    return parent.parent if parent.name == "results" else parent


def _exists(path: Path) -> bool:
    """Whether a file or directory exists and can be reached."""
    try:
        return path.exists()
    except OSError:  # a name that is too long, a directory that is closed
        return False


def _lies_inside(path: Path, directory: Path) -> bool:
    """Whether a file, or a directory with all that it links to, lies in a directory."""
    root = directory.resolve()  # realpath ends at a loop of links; resolve raises
    return all(Path(os.path.realpath(file)).is_relative_to(root) for file in chain([path], path.rglob("*")))


def check_parts(path: Path, manifest: Manifest) -> None:
    """Raise ArtifactError for a part that is missing or has another hash than the manifest lists."""
    remedy = f"Restore it, or run `{MADE_BY.get(manifest.kind, 'the stage')}` again with --overwrite."
    for part in manifest.parts:
        file = part_path(path, part)
        if file.stat().st_size != part.bytes or file_digest(file) != part.sha256:
            raise ArtifactError(f"{file} has a hash that differs from the manifest.", remedy)


def part_path(path: Path, part: Part) -> Path:
    """The file of a part. Raises ArtifactError unless it is a regular file inside the directory `path`."""
    file = path / part.file
    if not file.is_file():
        raise ArtifactError(f"{file} is missing.", "Restore it, or make the artifact again with --overwrite.")
    if not file.resolve().is_relative_to(path.resolve()):
        raise ArtifactError(f"{file} links to a file outside its artifact.", "Copy the file itself there.")
    return file
