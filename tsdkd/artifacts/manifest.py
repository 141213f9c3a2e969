"""What lies between two stages: a directory with `manifest.json` and the files it lists. Knows no torch."""

import json
import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from tsdkd import __version__
from tsdkd.artifacts.hashing import json_digest
from tsdkd.errors import ArtifactError

FORMAT = 1
MANIFEST_FILE = "manifest.json"
LOCK_FILE = ".lock"
JOURNAL_FILE = ".journal.jsonl"
"""What making it took (see journal.py); no part of the artifact."""
HUB_DATASET = "dataset"
"""Kind of a parent that lies on the hub; its path is its name."""

ArtifactKind = Literal["rollouts", "scores", "checkpoint", "results"]
MADE_BY: dict[str, str] = {
    "rollouts": "tsdkd generate",
    "scores": "tsdkd score",
    "checkpoint": "tsdkd train",
    "results": "tsdkd eval",
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
class ModelRecord:
    """A model that took part, by content: fingerprints of weights, tokenizer and chat template."""

    role: str
    name: str
    weights: str
    tokenizer: str
    chat_template: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything an artifact says about itself."""

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
    format: int = FORMAT
    tsdkd: str = __version__

    @property
    def identity(self) -> dict[str, Any]:
        """What the artifact is made from, by content: names and paths do not count."""
        return {
            "kind": self.kind,
            "seed": self.seed,
            "engine": self.engine,
            **flatten(self.config, "config."),
            **{f"parent {parent.kind}": parent.fingerprint for parent in self.parents},
            **{f"model {m.role}": [m.weights, m.tokenizer, m.chat_template] for m in self.models},
        }

    @property
    def fingerprint(self) -> str:
        """Identity and content in one hash; what children record."""
        content = [[part.file, part.rows, part.sha256] for part in self.parts]
        return json_digest({"identity": self.identity, "parts": content, "summary": self.summary})

    @property
    def rows(self) -> int:
        return sum(part.rows or 0 for part in self.parts)

    def model(self, role: str) -> ModelRecord:
        return next(model for model in self.models if model.role == role)


def load_manifest(path: Path) -> Manifest:
    """The manifest of an artifact in any state; its files are not looked at."""
    raw = read_raw_manifest(path)
    try:
        newer = raw["format"] > FORMAT
        if not newer:
            known = {f.name for f in fields(Manifest)}
            raw |= {
                "parents": tuple(Parent(**parent) for parent in raw["parents"]),
                "models": tuple(ModelRecord(**model) for model in raw["models"]),
                "parts": tuple(Part(**part) for part in raw["parts"]),
            }
            manifest = Manifest(**{key: value for key, value in raw.items() if key in known})
            MADE_BY[manifest.kind]
            return manifest
    except (KeyError, TypeError) as error:
        raise _unreadable(path, error) from None
    raise ArtifactError(f"{path} has format {raw['format']}; this tsdkd reads up to {FORMAT}.", "Update tsdkd.")


def read_raw_manifest(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads((path / MANIFEST_FILE).read_text())
    except FileNotFoundError:
        raise ArtifactError(
            f"{path} is no artifact: it has no {MANIFEST_FILE}.", "Name the directory of an artifact."
        ) from None
    except ValueError as error:
        raise _unreadable(path, error) from None
    if not isinstance(raw, dict):
        raise _unreadable(path, TypeError("no JSON object"))
    return raw


def _unreadable(path: Path, error: Exception) -> ArtifactError:
    return ArtifactError(f"{path / MANIFEST_FILE} cannot be read ({error}).", "Restore it, or remove the directory.")


def relative_path(path: Path, start: Path) -> str:
    """The way from an artifact to one of its parents, symbolic links resolved."""
    return os.path.relpath(path.resolve(), start.resolve())


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dotted names."""
    names: dict[str, Any] = {}
    for key, value in values.items():
        names |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return names
