"""The models and library versions that a manifest records; models are compared by fingerprint."""

import hashlib
from importlib.metadata import version
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from tsdkd.artifacts.hashing import file_digest, json_digest
from tsdkd.artifacts.manifest import ModelRecord
from tsdkd.errors import InputError
from tsdkd.stages.config.types import DType
from tsdkd.stages.models.adapters import adapter_settings, base_model_name
from tsdkd.stages.models.paths import model_directory
from tsdkd.stages.models.tokenizers import load_tokenizer
from tsdkd.stages.models.weights import check_saved_weights

FINGERPRINTED_FILES = ("*.safetensors", "*.bin", "config.json", "generation_config.json", "tokenizer.json")
"""Patterns of the files that decide a model's output."""


def model_record(role: str, name: str, dtype: DType = "auto") -> ModelRecord:
    """Fingerprints of a model's weights, tokenizer and chat template, without loading it.

    Raises InputError, also for weights that are not those of the architecture, or not finite in `dtype`.
    """
    tokenizer, directory = load_tokenizer(name), model_directory(name)
    check_saved_weights(name, directory, dtype)
    if base := base_model_name(directory):
        check_saved_weights(base, model_directory(base), dtype)
    local = Path(name).expanduser()
    return ModelRecord(
        role=role,
        name=str(local.resolve()) if local.is_dir() else name,  # a later stage may run in another directory
        weights=_weights_fingerprint(name),
        tokenizer=json_digest(sorted(tokenizer.get_vocab().items())),
        chat_template=hashlib.sha256(str(tokenizer.chat_template or "").encode()).hexdigest(),
    )


def _weights_fingerprint(name: str) -> str:
    """One hash of a model's files; for an adapter, of its files and its base model's."""
    directory = model_directory(name)
    files = sorted({file for pattern in FINGERPRINTED_FILES for file in directory.glob(pattern)})
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
