"""Models by name: fingerprint, load; and the few facts about them that stages need."""

import hashlib
from importlib.metadata import version

from transformers import (
    PreTrainedTokenizerBase,
)

from tsdkd.artifacts.hashing import file_digest, json_digest
from tsdkd.artifacts.manifest import ModelRecord
from tsdkd.errors import InputError
from tsdkd.stages.models.adapters import adapter_settings, base_model_name
from tsdkd.stages.models.paths import model_directory
from tsdkd.stages.models.tokenizers import load_tokenizer

FINGERPRINTED_FILES = ("*.safetensors", "*.bin", "config.json", "generation_config.json", "tokenizer.json")
"""Files that decide what a model says."""


def model_record(role: str, name: str) -> ModelRecord:
    """What a manifest records of a model; the weights are hashed, not loaded. Raises InputError."""
    tokenizer = load_tokenizer(name)
    return ModelRecord(
        role=role,
        name=name,
        weights=_weights(name),
        tokenizer=json_digest(sorted(tokenizer.get_vocab().items())),
        chat_template=hashlib.sha256(str(tokenizer.chat_template or "").encode()).hexdigest(),
    )


def _weights(name: str) -> str:
    """The content of a model, or of an adapter and its base, in one hash."""
    directory = model_directory(name)
    files = sorted({file for pattern in FINGERPRINTED_FILES for file in directory.glob(pattern)})
    if not any(file.suffix in {".safetensors", ".bin"} for file in files):
        raise InputError(f"{name} has no weights.", "Name a directory with model.safetensors (or its shards).")
    content = [[file.name, file_digest(file)] for file in files]
    base = base_model_name(directory)
    if base is None:
        return json_digest(content)
    return json_digest([content, adapter_settings(directory) | {"base_model_name_or_path": _weights(base)}])


def require_same_tokenizer(one: ModelRecord, other: ModelRecord) -> None:
    """Raise InputError unless two models map ids to the same tokens."""
    if one.tokenizer != other.tokenizer:
        ours, theirs = (_tokens_by_id(load_tokenizer(model.name)) for model in (one, other))
        unlike = sorted(i for i in ours.keys() | theirs.keys() if ours.get(i) != theirs.get(i))
        shown = [f"{i} ({ours.get(i)!r} against {theirs.get(i)!r})" for i in unlike[:3]]
        raise InputError(
            f"{one.role} {one.name} ({len(ours)} tokens) and {other.role} {other.name} ({len(theirs)}) have different "
            f"tokenizers: {len(unlike)} ids differ, first {', '.join(shown)}.",
            "Choose two models of one family; TSD-KD compares distributions over the same tokens.",
        )


def _tokens_by_id(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    return {i: token for token, i in tokenizer.get_vocab().items()}


def library_versions() -> dict[str, str]:
    """Versions that decide the bytes a stage writes."""
    return {name: version(name) for name in ("torch", "transformers", "tokenizers", "accelerate", "pyarrow")}
