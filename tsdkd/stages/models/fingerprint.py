"""The fingerprint of a model's weights: one hash of the files that decide its output."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from tsdkd.artifacts.hashing import json_digest
from tsdkd.artifacts.manifest import Manifest
from tsdkd.stages.models.adapters import ADAPTER_CONFIG, BASE, adapter_settings

FINGERPRINTED_FILES = ("*.safetensors", "*.bin", "config.json", "generation_config.json", "tokenizer.json")
"""Patterns of the files that decide a model's output."""


def weights_fingerprint(directory: Path, digests: Mapping[str, str], base: str | None = None) -> str:
    """`digests`: of the model's files by name; `base`: the fingerprint of an adapter's base model.

    Raises InputError for an adapter whose config cannot be read.
    """
    content = [[name, digests[name]] for name in sorted(digests) if _decides_output(name)]
    return json_digest(content if base is None else [content, adapter_settings(directory) | {BASE: base}])


def checkpoint_fingerprint(directory: Path, manifest: Manifest) -> str:
    """The fingerprint of a checkpoint, from the hashes that its manifest lists: no weight is read.

    Raises InputError for an adapter whose config cannot be read.
    """
    digests = {part.file: part.sha256 for part in manifest.parts}
    return weights_fingerprint(
        directory, digests, manifest.model("student").weights if ADAPTER_CONFIG in digests else None
    )


def _decides_output(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in FINGERPRINTED_FILES) and "/" not in name
