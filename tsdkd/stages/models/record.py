"""The models and library versions that a manifest records; models are compared by fingerprint."""

import hashlib
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from tsdkd.artifacts.files import MANIFEST_FILE
from tsdkd.artifacts.hashing import file_digest, json_digest
from tsdkd.artifacts.manifest import ModelRecord, load_manifest
from tsdkd.errors import InputError
from tsdkd.stages.models.adapters import adapter_settings, base_model_name
from tsdkd.stages.models.paths import model_directory
from tsdkd.stages.models.tokenizers import load_tokenizer, writes_day

FINGERPRINTED_FILES = ("*.safetensors", "*.bin", "config.json", "generation_config.json", "tokenizer.json")
"""Patterns of the files that decide a model's output."""


def model_record(role: str, name: str) -> ModelRecord:
    """Fingerprints of a model's weights, tokenizer and chat template, without loading it. Raises InputError."""
    tokenizer = load_tokenizer(name)
    local = Path(name).expanduser()
    return ModelRecord(
        role=role,
        name=str(local.resolve()) if local.is_dir() else name,  # a later stage may run in another directory
        weights=_weights_fingerprint(name),
        tokenizer=json_digest(sorted(tokenizer.get_vocab().items())),
        chat_template=hashlib.sha256(str(tokenizer.chat_template or "").encode()).hexdigest(),
    )


def chat_day(tokenizer: PreTrainedTokenizerBase, output: Path, overwrite: bool) -> str | None:
    """The day that an artifact's chat template writes: the one that the artifact at `output` records, else today.

    None for a template that writes no day.
    """
    if not writes_day(tokenizer):
        return None
    existing = None if overwrite or not (output / MANIFEST_FILE).is_file() else load_manifest(output)
    if existing and (existing.day or existing.state == "complete"):
        return existing.day
    return datetime.now().astimezone().date().isoformat()


def _weights_fingerprint(name: str) -> str:
    """One hash of a model's files; for an adapter, of its files and its base model's."""
    directory = model_directory(name)
    files = sorted({file for pattern in FINGERPRINTED_FILES for file in directory.glob(pattern)})
    if not any(file.suffix in {".safetensors", ".bin"} for file in files):
        raise InputError(f"{name} has no weights.", "Name a directory with model.safetensors (or its shards).")
    content = [[file.name, file_digest(file)] for file in files]
    base = base_model_name(directory)
    if base is None:
        return json_digest(content)
    settings = adapter_settings(directory) | {"base_model_name_or_path": _weights_fingerprint(base)}
    return json_digest([content, settings])


def require_same_tokenizer(first: ModelRecord, second: ModelRecord) -> None:
    """Raises InputError unless both models map the same ids to the same tokens."""
    if first.tokenizer == second.tokenizer:
        return
    tokens, others = (_tokens_by_id(load_tokenizer(model.name)) for model in (first, second))
    different = sorted(i for i in tokens.keys() | others.keys() if tokens.get(i) != others.get(i))
    examples = [f"{i} ({tokens.get(i)!r} against {others.get(i)!r})" for i in different[:3]]
    raise InputError(
        f"{first.role} {first.name} ({len(tokens)} tokens) and {second.role} {second.name} ({len(others)}) have "
        f"different tokenizers: {len(different)} ids differ, first {', '.join(examples)}.",
        "Choose two models of one family; TSD-KD compares distributions over the same tokens.",
    )


def _tokens_by_id(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    return {i: token for token, i in tokenizer.get_vocab().items()}


def library_versions() -> dict[str, str]:
    """Versions of the libraries that decide the bytes of an artifact."""
    return {name: version(name) for name in ("torch", "transformers", "tokenizers", "accelerate", "pyarrow")}
