"""What lies between two stages: a directory with `manifest.json` and the files it lists. Knows no torch.

A `writer.Writer` makes one; a `read` trusts nothing: kind, format, state, sizes, hashes and parents are checked before
a stage sees a row.

An artifact's *identity* is what it is made from: configuration, seed, parents, models, engine. Running a stage again
with the same identity resumes or does nothing; with another it refuses. Its *fingerprint* adds the content, and
children record it. Manifests hold no time: the same work gives the same bytes.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from tsdkd import __version__
from tsdkd.errors import ArtifactError

FORMAT = 1
MANIFEST = "manifest.json"
LOCK = ".lock"
JOURNAL = ".journal.jsonl"
"""What making it took (see journal.py); no part of the artifact."""
DATASET = "dataset"
"""Kind of a parent that lies on the hub; its path is its name."""

Kind = Literal["rollouts", "scores", "checkpoint", "results"]
MADE_BY: dict[str, str] = {
    "rollouts": "tsdkd generate",
    "scores": "tsdkd score",
    "checkpoint": "tsdkd train",
    "results": "tsdkd eval",
}

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
SCHEMAS: dict[str, pa.Schema] = {
    "rollouts": pa.schema(
        [
            ("sample_id", pa.string()),
            ("prompt_id", pa.string()),
            ("source", pa.string()),
            ("messages", MESSAGES),
            ("prompt_ids", pa.list_(pa.int32())),
            ("response_ids", pa.list_(pa.int32())),  # as the engine produced them, end token included
            ("response", pa.string()),  # for people; never tokenised again
            ("finish_reason", pa.string()),  # "stop" or "length"
            ("author", pa.string()),  # "student", "teacher", "both" (speculative) or "mixture" (teacher-mixed)
            ("teacher_tokens", pa.int32()),  # how many of the response's tokens the teacher chose
        ]
    ),
    # Lists run over the response's tokens; those of k or K entries a token are flattened, token after token.
    "scores": pa.schema(
        [
            ("sample_id", pa.string()),
            ("student_entropy", pa.list_(pa.float32())),
            ("teacher_entropy", pa.list_(pa.float32())),
            ("student_logprob", pa.list_(pa.float32())),  # of the sampled token
            ("teacher_logprob", pa.list_(pa.float32())),
            ("candidates", pa.list_(pa.int32())),  # the student's k, best first
            ("ranks", pa.list_(pa.int16())),  # the teacher's rank of each, 0 is its favourite
            ("hidden", pa.large_binary()),  # tokens x width; "hidden": the teacher's dtype, "hidden8": int8
            ("hidden_scale", pa.list_(pa.float32())),  # signal "hidden8": what its int8 are multiplied with
            ("top_ids", pa.list_(pa.int32())),  # signal "topk": the teacher's K, best first
            ("top_logprobs", pa.list_(pa.float32())),
            ("divergence", pa.list_(pa.float32())),  # of the student, as of scoring; only beside lossy signals
            ("recorded_divergence", pa.list_(pa.float32())),  # the same from what the signal keeps
        ]
    ),
    "results": pa.schema(
        [
            ("task", pa.string()),
            ("subtask", pa.string()),  # lm-eval's task; a document is numbered in it
            ("document", pa.int32()),
            ("hash", pa.string()),  # of the document
            ("metric", pa.string()),  # a document has a row for each that is reported
            ("prompt", pa.string()),
            ("answer", pa.string()),
            ("extracted", pa.string()),
            ("target", pa.string()),
            ("score", pa.float64()),
            ("weight", pa.float64()),  # of the document in the mean: IFEval counts instructions
            ("truncated", pa.bool_()),  # the answer was cut off at its limit
            ("prompt_cut", pa.bool_()),  # the prompt was too long and lost its beginning
        ]
    ),
}


@dataclass(frozen=True, slots=True)
class Part:
    """One file of an artifact; `rows` is None where the file is no table."""

    file: str
    rows: int | None
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Parent:
    """What an artifact was made from: another one, a file, folder or dataset. `path` is relative to the artifact."""

    kind: str
    fingerprint: str
    path: str


@dataclass(frozen=True, slots=True)
class Model:
    """A model that took part, by content: fingerprints of weights, tokenizer and chat template."""

    role: str
    name: str
    weights: str
    tokenizer: str
    chat_template: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything an artifact says about itself."""

    kind: Kind
    config: dict[str, Any]
    seed: int
    parents: tuple[Parent, ...] = ()
    models: tuple[Model, ...] = ()
    engine: str = "transformers"
    libraries: dict[str, str] = field(default_factory=dict)
    parts: tuple[Part, ...] = ()
    state: str = "partial"
    summary: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT
    tsdkd: str = __version__

    @property
    def identity(self) -> dict[str, Any]:
        """What the artifact is made from, by content: names and paths do not count."""
        return {
            "kind": self.kind,
            "seed": self.seed,
            "engine": self.engine,
            **flat(self.config, "config."),
            **{f"parent {parent.kind}": parent.fingerprint for parent in self.parents},
            **{f"model {m.role}": [m.weights, m.tokenizer, m.chat_template] for m in self.models},
        }

    @property
    def fingerprint(self) -> str:
        """Identity and content in one hash; what children record."""
        content = [[part.file, part.rows, part.sha256] for part in self.parts]
        return digest({"identity": self.identity, "parts": content, "summary": self.summary})

    @property
    def rows(self) -> int:
        return sum(part.rows or 0 for part in self.parts)

    def model(self, role: str) -> Model:
        return next(model for model in self.models if model.role == role)


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
        return Parent(self.manifest.kind, self.fingerprint, relative(self.path, child))

    def require_parent(self, other: "Artifact") -> None:
        """Raise ArtifactError unless this artifact was made from `other`."""
        kind = other.manifest.kind
        found = next((parent.fingerprint for parent in self.manifest.parents if parent.kind == kind), "none")
        if found != other.fingerprint:
            raise ArtifactError(
                f"{self.path} was made from other {kind} ({found[:12]}) than {other.path} ({other.fingerprint[:12]}).",
                f"Name the {kind} it was made from, or run `{MADE_BY[self.manifest.kind]}` again with --overwrite.",
            )


def read(path: Path, kind: Kind, option: str | None = None, *, hashed: bool = True) -> Artifact:
    """Open a finished artifact of one kind; every file is hashed, unless only its manifest is wanted.

    Raises ArtifactError, naming what was found, what was expected and what to run (or which `option` to give).
    """
    maker = MADE_BY[kind]
    if not (path / MANIFEST).is_file():
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


def load_manifest(path: Path) -> Manifest:
    """The manifest of an artifact in any state; its files are not looked at."""
    raw = raw_manifest(path)
    try:
        newer = raw["format"] > FORMAT
        if not newer:
            known = {f.name for f in fields(Manifest)}
            raw |= {
                "parents": tuple(Parent(**parent) for parent in raw["parents"]),
                "models": tuple(Model(**model) for model in raw["models"]),
                "parts": tuple(Part(**part) for part in raw["parts"]),
            }
            manifest = Manifest(**{key: value for key, value in raw.items() if key in known})
            MADE_BY[manifest.kind]
            return manifest
    except (KeyError, TypeError) as error:
        raise _unreadable(path, error) from None
    raise ArtifactError(f"{path} has format {raw['format']}; this tsdkd reads up to {FORMAT}.", "Update tsdkd.")


def raw_manifest(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads((path / MANIFEST).read_text())
    except FileNotFoundError:
        raise ArtifactError(
            f"{path} is no artifact: it has no {MANIFEST}.", "Name the directory of an artifact."
        ) from None
    except ValueError as error:
        raise _unreadable(path, error) from None
    if not isinstance(raw, dict):
        raise _unreadable(path, TypeError("no JSON object"))
    return raw


def _unreadable(path: Path, error: Exception) -> ArtifactError:
    return ArtifactError(f"{path / MANIFEST} cannot be read ({error}).", "Restore it, or remove the directory.")


def verify(path: Path) -> Manifest:
    """Check an artifact as `read` does, its tables' schemas and rows, and that parents still there are unchanged."""
    manifest = load_manifest(path)
    artifact = read(path, manifest.kind)
    for part in artifact.tables:
        found = pq.ParquetFile(path / part.file)
        if found.schema_arrow != SCHEMAS[manifest.kind] or found.metadata.num_rows != part.rows:
            raise ArtifactError(
                f"{path / part.file} has other columns or rows than its manifest says.",
                f"Run `{MADE_BY[manifest.kind]}` again.",
            )
    for parent, there, same in parents_of(path, manifest):
        if there and not same:
            raise ArtifactError(
                f"The {parent.kind} at {path / parent.path} changed after {path} was made from them.",
                f"Restore them, or run `{MADE_BY[manifest.kind]}` again with --overwrite.",
            )
    return manifest


def parents_of(path: Path, manifest: Manifest) -> Iterator[tuple[Parent, bool, bool]]:
    """Each parent with two facts: is something at its path, and has that the recorded fingerprint?"""
    for parent in manifest.parents:
        place = path / parent.path
        if parent.kind == DATASET:
            there = same = True  # not ours to look after
        elif parent.kind in MADE_BY:
            there = (place / MANIFEST).is_file()
            same = there and load_manifest(place).fingerprint == parent.fingerprint
        else:
            there = place.exists()
            same = there and content_digest(place) == parent.fingerprint
        yield parent, there, same


def relative(path: Path, start: Path) -> str:
    """The way from an artifact to one of its parents, symbolic links resolved."""
    return os.path.relpath(path.resolve(), start.resolve())


def digest(value: Any) -> str:
    """SHA-256 of a JSON-able value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dotted names."""
    names: dict[str, Any] = {}
    for key, value in values.items():
        names |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return names


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_digest(path: Path) -> str:
    """Of a file; or of a directory, by the names and contents of its files, hidden ones aside."""
    if path.is_file():
        return file_digest(path)
    names = sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())
    return digest(
        [[name, file_digest(path / name)] for name in names if not any(p.startswith(".") for p in name.split("/"))]
    )


def check_parts(path: Path, manifest: Manifest) -> None:
    remedy = f"Restore it, or run `{MADE_BY.get(manifest.kind, 'the stage')}` again with --overwrite."
    for part in manifest.parts:
        file = path / part.file
        if not file.is_file():
            raise ArtifactError(f"{file} is missing.", remedy)
        if file.stat().st_size != part.bytes or file_digest(file) != part.sha256:
            raise ArtifactError(f"{file} was changed: its hash differs from the manifest's.", remedy)
