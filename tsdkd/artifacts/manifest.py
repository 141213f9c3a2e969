"""The manifest of an artifact: its identity, the parts that it lists, and its state.

Manifests are untrusted: annotations limit the values of each field, and `load_manifest` checks them.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from tsdkd import __version__
from tsdkd.artifacts.disk import replace_text
from tsdkd.artifacts.file_system import require_local_path
from tsdkd.artifacts.files import MANIFEST_FILE
from tsdkd.artifacts.hashing import json_digest
from tsdkd.artifacts.json_files import Record, conform, read_json, unreadable_error
from tsdkd.artifacts.rules import Count, Date, PartName, PathText, Sha256, Word, all_differ
from tsdkd.artifacts.summaries import SUMMARIES
from tsdkd.errors import ArtifactError

Given = TypeVar("Given")

FORMAT = 2
"""Increases when an older tsdkd would misread new artifacts, or this one would misread old artifacts."""
HUB_DATASET = "dataset"
"""The kind of a parent on the hub; its path is the name of the dataset."""

ArtifactKind = Literal["rollouts", "scores", "checkpoint", "results"]
MADE_BY: dict[str, str] = {
    "rollouts": "tsdkd generate",
    "scores": "tsdkd score",
    "checkpoint": "tsdkd train",
    "results": "tsdkd eval",
}


@dataclass(frozen=True, slots=True)
class Part:
    """One file of an artifact; `rows` is None unless the file is a table."""

    file: PartName
    rows: Count | None
    bytes: Count
    sha256: Sha256


@dataclass(frozen=True, slots=True)
class Parent:
    """An artifact, file, directory or dataset that an artifact was made from; `path` is relative to the artifact."""

    kind: Word
    fingerprint: Word
    path: PathText


SERVED = "served"
NAMED_TEACHER = "teacher:"
"""How the role of each of several teachers begins; its name follows."""
MAX_TEACHER_NAME = 40
"""Characters; the results of a teacher are in a directory of its name."""


@dataclass(frozen=True, slots=True)
class ModelRecord:
    """A model that made the artifact, by its name and by fingerprints of weights, tokenizer and chat template."""

    role: Word
    name: PathText
    weights: Word
    tokenizer: Word
    chat_template: Word
    """`SERVED` for a teacher that a server reads; `weights` is then the fingerprint of its answers."""

    @property
    def served(self) -> bool:
        """Whether a server read the model, so that its files may not be here."""
        return self.chat_template == SERVED

    @property
    def teacher_name(self) -> str | None:
        """The name of one of several teachers, "" for the only one; None for another role."""
        return teacher_name(self.role)


@dataclass(frozen=True, slots=True)
class Manifest:
    """The content of `manifest.json`."""

    kind: ArtifactKind
    config: dict[str, Any]
    seed: int
    parents: Annotated[tuple[Parent, ...], all_differ("kind")] = ()
    models: Annotated[tuple[ModelRecord, ...], all_differ("role")] = ()
    engine: Word = "transformers"
    libraries: dict[str, Word] = field(default_factory=dict)
    parts: Annotated[tuple[Part, ...], all_differ("file")] = ()
    state: Literal["partial", "complete"] = "partial"
    summary: dict[str, Any] = field(default_factory=dict)
    day: Date | None = None
    """The day, such as 2026-11-27, that the chat template writes; None for a template that writes none."""
    format: int = FORMAT
    tsdkd: Word = __version__

    @property
    def identity(self) -> dict[str, Any]:
        """The contents that the artifact is made from, without names and paths."""
        return {
            "kind": self.kind,
            "seed": self.seed,
            "engine": self.engine,
            **flatten(self.config, "config."),
            **({"day": self.day} if self.day else {}),
            **{f"parent {parent.kind}": parent.fingerprint for parent in self.parents},
            **{f"model {m.role}": [m.weights, m.tokenizer, m.chat_template] for m in self.models},
        }

    @property
    def fingerprint(self) -> str:
        """One hash of identity and content, which children record."""
        content = [[part.file, part.rows, part.sha256] for part in self.parts]
        return json_digest({"identity": self.identity, "parts": content, "summary": self.summary})

    @property
    def rows(self) -> int:
        return sum(part.rows or 0 for part in self.parts)

    @property
    def teachers(self) -> dict[str, ModelRecord]:
        """The teachers by name, in the order of names; the name of an only teacher is ""."""
        named = [(model.teacher_name, model) for model in self.models if model.teacher_name is not None]
        return dict(sorted(named, key=lambda pair: pair[0]))

    def model(self, role: str) -> ModelRecord:
        """Raises ArtifactError if the artifact records no model of this role."""
        if record := next((model for model in self.models if model.role == role), None):
            return record
        raise self._without(role)

    def require_teachers(self) -> tuple[ModelRecord, ...]:
        """The teachers in the order of names. Raises ArtifactError if the artifact records none."""
        if teachers := tuple(self.teachers.values()):
            return teachers
        raise self._without("teacher")

    def _without(self, role: str) -> ArtifactError:
        return ArtifactError(
            f"The artifact {self.kind} records no {role} model.", f"Run `{MADE_BY[self.kind]}` again with --overwrite."
        )


def is_teacher_name(name: str) -> bool:
    """Whether `--teacher NAME=MODEL` can name a teacher so."""
    return 0 < len(name) <= MAX_TEACHER_NAME and name.isprintable() and "=" not in name


def teacher_name(role: str) -> str | None:
    """The name of the teacher of a role, "" for the only one; None for another role."""
    if role.startswith(NAMED_TEACHER):
        return role.removeprefix(NAMED_TEACHER)
    return "" if role == "teacher" else None


def teachers_by_name(given: str | Mapping[str, Given]) -> dict[str, str | Given]:
    """What is given for each teacher, in the order of names; for an only one alone, its name is ""."""
    return {"": given} if isinstance(given, str) else dict(sorted(given.items()))


def teacher_role(name: str) -> str:
    """The role of a teacher of this name; "" names an only teacher."""
    return f"{NAMED_TEACHER}{name}" if name else "teacher"


CONFIG_CHECKS: list[Callable[[ArtifactKind, Record], None]] = []
"""Functions that check the configuration of a kind of artifact, and raise ValueError; `tsdkd.stages` adds one."""


def load_manifest(path: Path) -> Manifest:
    """Read the manifest of an artifact in any state, without its parts.

    Raises ArtifactError for a directory without a manifest, an unreadable manifest, and another format.
    """
    return check_manifest(read_raw_manifest(path), path)


def check_manifest(raw: dict[str, Any], path: Path | str) -> Manifest:
    """The manifest of the artifact at `path`, which may be a URL, from its JSON. Raises ArtifactError."""
    file, format_ = f"{path}/{MANIFEST_FILE}", raw.get("format")
    if type(format_) is int and format_ != FORMAT:
        raise _format_error(path, format_, raw)
    try:
        manifest: Manifest = conform(raw, Manifest)
        conform(manifest.summary, SUMMARIES[manifest.kind], "summary")
        for check in CONFIG_CHECKS:
            check(manifest.kind, Record(manifest.config))
    except ValueError as error:
        raise unreadable_error(file, error) from None
    return manifest


def require_own_hash(raw: dict[str, Any], path: Path | str) -> None:
    """Raises ArtifactError for the JSON of a manifest that was changed after it was written."""
    content = {key: value for key, value in raw.items() if key != "sha256"}
    if raw.get("sha256") not in (None, json_digest(content)):  # None: written by an earlier tsdkd
        raise ArtifactError(
            f"{path}/{MANIFEST_FILE} was changed after it was written.",
            f"Restore it, or run `{MADE_BY.get(str(raw.get('kind')), 'the stage')}` again with --overwrite.",
        )


def _format_error(path: Path | str, format_: int, raw: dict[str, Any]) -> ArtifactError:
    if format_ > FORMAT:
        return ArtifactError(f"{path} has format {format_}; this tsdkd reads format {FORMAT}.", "Update tsdkd.")
    return ArtifactError(
        f"{path} has format {format_} of an earlier tsdkd; this one reads format {FORMAT}.",
        f"Run `{MADE_BY.get(str(raw.get('kind')), 'the stage that wrote it')}` again with --overwrite, "
        "or in another directory.",
    )


def save_manifest(path: Path, manifest: Manifest) -> None:
    """Replace the manifest of an artifact in one step, with its own hash; it is on disk when the function returns."""
    content = asdict(manifest)
    text = json.dumps(content | {"sha256": json_digest(content)}, indent=1, sort_keys=True)
    replace_text(path / MANIFEST_FILE, text + "\n")


def read_raw_manifest(path: Path) -> dict[str, Any]:
    """A manifest as JSON, of any format. Raises ArtifactError."""
    try:
        raw: dict[str, Any] = read_json(path / MANIFEST_FILE, dict[str, Any])
    except (FileNotFoundError, NotADirectoryError):
        require_local_path(path)
        raise ArtifactError(
            f"{path} holds no {MANIFEST_FILE}, so it is not an artifact.", "Name the directory of an artifact."
        ) from None
    return raw


def relative_path(path: Path, start: Path) -> str:
    """The path from the directory `start` to `path`, symbolic links resolved."""
    return os.path.relpath(path.resolve(), start.resolve())


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one dictionary with dotted names."""
    names: dict[str, Any] = {}
    for key, value in values.items():
        names |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return names
