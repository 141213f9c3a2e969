"""What lies between two stages: a directory with `manifest.json` and the files it lists. Knows no torch."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tsdkd.artifacts.hashing import content_digest, file_digest
from tsdkd.artifacts.manifest import (
    HUB_DATASET,
    MADE_BY,
    MANIFEST_FILE,
    ArtifactKind,
    Manifest,
    Parent,
    Part,
    load_manifest,
    relative_path,
)
from tsdkd.artifacts.schemas import SCHEMAS
from tsdkd.errors import ArtifactError


@dataclass(frozen=True, slots=True)
class Artifact:
    """A finished artifact whose every listed file was found to be what the manifest says."""

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
        """All rows, in order."""
        return pa.concat_tables(self.read_part(part) for part in self.tables)

    def as_parent_of(self, child: Path) -> Parent:
        return Parent(self.manifest.kind, self.fingerprint, relative_path(self.path, child))

    def require_parent(self, other: "Artifact") -> None:
        """Raise ArtifactError unless this artifact was made from `other`."""
        kind = other.manifest.kind
        found = next((parent.fingerprint for parent in self.manifest.parents if parent.kind == kind), "none")
        if found != other.fingerprint:
            raise ArtifactError(
                f"{self.path} was made from other {kind} ({found[:12]}) than {other.path} ({other.fingerprint[:12]}).",
                f"Name the {kind} it was made from, or run `{MADE_BY[self.manifest.kind]}` again with --overwrite.",
            )


def read_artifact(path: Path, kind: ArtifactKind, option: str | None = None, *, hashed: bool = True) -> Artifact:
    """Open a finished artifact of one kind; every file is hashed, unless only its manifest is wanted.

    Raises ArtifactError, naming what was found, what was expected and what to run (or which `option` to give).
    """
    maker = MADE_BY[kind]
    if not (path / MANIFEST_FILE).is_file():
        name = option or f"--{kind}"
        raise ArtifactError(f"Found no {kind} at {path}.", f"Run `{maker}` first, or name it with {name}.")
    manifest = load_manifest(path)
    if manifest.kind != kind:
        raise ArtifactError(f"{path} holds {manifest.kind}, not {kind}.", f"Name an artifact that `{maker}` wrote.")
    if manifest.state != "complete":
        raise ArtifactError(
            f"{path} is not finished: {len(manifest.parts)} parts so far.", f"Run `{maker}` again to finish it."
        )
    if hashed:
        check_parts(path, manifest)
    return Artifact(path, manifest)


def verify_artifact(path: Path) -> Manifest:
    """Check an artifact as `read` does, its tables' schemas and rows, and that parents still there are unchanged."""
    manifest = load_manifest(path)
    artifact = read_artifact(path, manifest.kind)
    for part in artifact.tables:
        found = pq.ParquetFile(path / part.file)
        if found.schema_arrow != SCHEMAS[manifest.kind] or found.metadata.num_rows != part.rows:
            raise ArtifactError(
                f"{path / part.file} has other columns or rows than its manifest says.",
                f"Run `{MADE_BY[manifest.kind]}` again.",
            )
    for parent, there, same in check_parents(path, manifest):
        if there and not same:
            raise ArtifactError(
                f"The {parent.kind} at {path / parent.path} changed after {path} was made from them.",
                f"Restore them, or run `{MADE_BY[manifest.kind]}` again with --overwrite.",
            )
    return manifest


def check_parents(path: Path, manifest: Manifest) -> Iterator[tuple[Parent, bool, bool]]:
    """Each parent with two facts: is something at its path, and has that the recorded fingerprint?"""
    for parent in manifest.parents:
        place = path / parent.path
        if parent.kind == HUB_DATASET:
            there = same = True  # not ours to look after
        elif parent.kind in MADE_BY:
            there = (place / MANIFEST_FILE).is_file()
            same = there and load_manifest(place).fingerprint == parent.fingerprint
        else:
            there = place.exists()
            same = there and content_digest(place) == parent.fingerprint
        yield parent, there, same


def check_parts(path: Path, manifest: Manifest) -> None:
    remedy = f"Restore it, or run `{MADE_BY.get(manifest.kind, 'the stage')}` again with --overwrite."
    for part in manifest.parts:
        file = path / part.file
        if not file.is_file():
            raise ArtifactError(f"{file} is missing.", remedy)
        if file.stat().st_size != part.bytes or file_digest(file) != part.sha256:
            raise ArtifactError(f"{file} was changed: its hash differs from the manifest's.", remedy)
