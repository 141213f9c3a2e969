"""Reading an artifact: kind, format, state, sizes, hashes and parents are checked before a stage sees a row."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tsdkd.artifacts.files import MANIFEST_FILE
from tsdkd.artifacts.hashing import content_digest, file_digest, json_digest
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
)
from tsdkd.artifacts.replacing import clean, restore_missing
from tsdkd.artifacts.schemas import SCHEMAS
from tsdkd.errors import ArtifactError


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

    def read_part(self, part: Part, columns: list[str] | None = None) -> pa.Table:
        return pq.read_table(self.path / part.file, columns=columns)

    def table(self) -> pa.Table:
        """All rows, in the order of the parts."""
        return pa.concat_tables(self.read_part(part) for part in self.tables)

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
        name = option or f"--{kind}"
        raise ArtifactError(f"Found no {kind} at {path}.", f"Run `{command}` first, or name the {kind} with {name}.")
    manifest = load_manifest(path)
    if manifest.kind != kind:
        raise ArtifactError(f"{path} holds {manifest.kind}, not {kind}.", f"Name an artifact that `{command}` wrote.")
    if manifest.state != "complete":
        raise ArtifactError(
            f"{path} is not finished: {len(manifest.parts)} parts are written.",
            f"Run `{command}` again to complete it.",
        )
    clean(path)
    if hashed:
        check_parts(path, manifest)
    return Artifact(path, manifest)


@reading_inputs()
def verify_artifact(path: Path) -> Manifest:
    """Check an artifact as `read_artifact` does, then columns and rows, parents, and the manifest's hash.

    Raises ArtifactError for the first difference. A parent that was removed is not a difference.
    """
    manifest = load_manifest(path)
    artifact = read_artifact(path, manifest.kind)
    for part in artifact.tables:
        file = pq.ParquetFile(path / part.file)
        if file.schema_arrow != SCHEMAS[manifest.kind] or file.metadata.num_rows != part.rows:
            raise ArtifactError(
                f"{path / part.file} has columns or rows that differ from the manifest.",
                f"Run `{MADE_BY[manifest.kind]}` again.",
            )
    for parent, exists, unchanged in check_parents(path, manifest):
        if exists and not unchanged:
            raise ArtifactError(
                f"{path / parent.path} ({parent.kind}) changed after {path} was made from it.",
                f"Restore it, or run `{MADE_BY[manifest.kind]}` again with --overwrite.",
            )
    content = read_raw_manifest(path)
    if content.pop("sha256", None) not in {None, json_digest(content)}:  # None: written by an earlier tsdkd
        raise ArtifactError(
            f"{path / MANIFEST_FILE} was changed after it was written.",
            f"Restore it, or run `{MADE_BY[manifest.kind]}` again with --overwrite.",
        )
    return manifest


def check_parents(path: Path, manifest: Manifest) -> Iterator[tuple[Parent, bool, bool]]:
    """Yield each parent, whether its path exists, and whether it has the recorded fingerprint."""
    for parent in manifest.parents:
        location = path / parent.path
        if parent.kind == HUB_DATASET:
            exists = unchanged = True  # a dataset of the hub is not checked
        elif parent.kind in MADE_BY:
            exists = (location / MANIFEST_FILE).is_file()
            unchanged = exists and load_manifest(location).fingerprint == parent.fingerprint
        else:
            exists = location.exists()
            unchanged = exists and content_digest(location) == parent.fingerprint
        yield parent, exists, unchanged


def check_parts(path: Path, manifest: Manifest) -> None:
    """Raise ArtifactError for a part that is missing or has another hash than the manifest lists."""
    remedy = f"Restore it, or run `{MADE_BY.get(manifest.kind, 'the stage')}` again with --overwrite."
    for part in manifest.parts:
        file = path / part.file
        if not file.is_file():
            raise ArtifactError(f"{file} is missing.", remedy)
        if file.stat().st_size != part.bytes or file_digest(file) != part.sha256:
            raise ArtifactError(f"{file} has a hash that differs from the manifest.", remedy)
