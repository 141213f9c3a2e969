"""The manifest of an artifact: its identity, the parts that it lists, and its state."""

import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from tsdkd import __version__
from tsdkd.artifacts.disk import fsync
from tsdkd.artifacts.files import MANIFEST_FILE
from tsdkd.artifacts.hashing import json_digest
from tsdkd.errors import ArtifactError

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

    file: str
    rows: int | None
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Parent:
    """An artifact, file, directory or dataset that an artifact was made from; `path` is relative to the artifact."""

    kind: str
    fingerprint: str
    path: str


@dataclass(frozen=True, slots=True)
class ModelRecord:
    """A model that made the artifact, by its name and by fingerprints of weights, tokenizer and chat template."""

    role: str
    name: str
    weights: str
    tokenizer: str
    chat_template: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """The content of `manifest.json`."""

    kind: ArtifactKind
    config: dict[str, Any]
    seed: int
    parents: tuple[Parent, ...] = ()
    models: tuple[ModelRecord, ...] = ()
    engine: str = "transformers"
    libraries: dict[str, str] = field(default_factory=dict)
    parts: tuple[Part, ...] = ()
    state: str = "partial"
    summary: dict[str, Any] = field(default_factory=dict)
    day: str | None = None
    """The day, such as 2026-11-27, that the chat template writes; None for a template that writes none."""
    format: int = FORMAT
    tsdkd: str = __version__

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

    def model(self, role: str) -> ModelRecord:
        return next(model for model in self.models if model.role == role)


def load_manifest(path: Path) -> Manifest:
    """Read the manifest of an artifact in any state, without its parts.

    Raises ArtifactError for a directory without a manifest, an unreadable manifest, and another format.
    """
    raw = read_raw_manifest(path)
    try:
        if raw["format"] == FORMAT:
            known = {f.name for f in fields(Manifest)}
            raw |= {
                "parents": tuple(Parent(**parent) for parent in raw["parents"]),
                "models": tuple(ModelRecord(**model) for model in raw["models"]),
                "parts": tuple(Part(**part) for part in raw["parts"]),
            }
            manifest = Manifest(**{key: value for key, value in raw.items() if key in known})
            MADE_BY[manifest.kind]
            return manifest
        if raw["format"] > FORMAT:
            raise ArtifactError(
                f"{path} has format {raw['format']}; this tsdkd reads format {FORMAT}.", "Update tsdkd."
            )
        raise ArtifactError(
            f"{path} has format {raw['format']} of an earlier tsdkd; this one reads format {FORMAT}.",
            f"Run `{MADE_BY.get(raw['kind'], 'the stage that wrote it')}` again with --overwrite, "
            "or in another directory.",
        )
    except (KeyError, TypeError) as error:
        raise _unreadable(path, error) from None


def save_manifest(path: Path, manifest: Manifest) -> None:
    """Replace the manifest of an artifact in one step; it is on disk when the function returns."""
    temporary = path / f"{MANIFEST_FILE}.tmp"
    temporary.write_text(json.dumps(asdict(manifest), indent=1, sort_keys=True) + "\n")
    fsync(temporary)
    temporary.replace(path / MANIFEST_FILE)
    fsync(path)


def read_raw_manifest(path: Path) -> dict[str, Any]:
    if not (path / MANIFEST_FILE).is_file():
        raise ArtifactError(
            f"{path} holds no {MANIFEST_FILE}, so it is not an artifact.", "Name the directory of an artifact."
        )
    try:
        raw = json.loads((path / MANIFEST_FILE).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise _unreadable(path, error) from None
    if not isinstance(raw, dict):
        raise _unreadable(path, TypeError("not a JSON object"))
    return raw


def _unreadable(path: Path, error: Exception) -> ArtifactError:
    return ArtifactError(
        f"{path / MANIFEST_FILE} cannot be read ({error}).", "Restore the file, or remove the directory."
    )


def relative_path(path: Path, start: Path) -> str:
    """The path from the directory `start` to `path`, symbolic links resolved."""
    return os.path.relpath(path.resolve(), start.resolve())


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one dictionary with dotted names."""
    names: dict[str, Any] = {}
    for key, value in values.items():
        names |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return names
