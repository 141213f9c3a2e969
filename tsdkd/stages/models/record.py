"""The models and library versions that a manifest records; models are compared by fingerprint."""

import hashlib
from collections.abc import Collection
from datetime import datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from tsdkd.artifacts.files import MANIFEST_FILE
from tsdkd.artifacts.hashing import file_digest, json_digest
from tsdkd.artifacts.manifest import Manifest, ModelRecord, load_manifest
from tsdkd.artifacts.opening import find_continued
from tsdkd.errors import InputError
from tsdkd.stages.config.chat import ChatConfig
from tsdkd.stages.models.fingerprint import FINGERPRINTED_FILES, weights_fingerprint
from tsdkd.stages.models.paths import base_directory, model_directory
from tsdkd.stages.models.tokenizers import load_tokenizer, writes_day
from tsdkd.stages.models.weights import check_saved_tensors


def model_record(role: str, name: str, *, hashed: bool = True, chat: ChatConfig | None = None) -> ModelRecord:
    """Fingerprints of a model's weights, tokenizer and chat template, without loading it.

    `hashed`: False leaves the fingerprint of the weights empty, and reads none of them.
    `chat`: as for `load_tokenizer`.

    Raises InputError, also for tensors that are not those of the architecture.
    """
    tokenizer, directory = load_tokenizer(name, chat), model_directory(name)
    check_saved_tensors(name, directory)
    if base := base_directory(directory):
        check_saved_tensors(str(base), base)
    local = Path(name).expanduser()
    return ModelRecord(
        role=role,
        name=str(local.resolve()) if local.is_dir() else name,  # a later stage may run in another directory
        weights=_weights_fingerprint(directory) if hashed else "",
        tokenizer=json_digest(sorted(tokenizer.get_vocab().items())),
        chat_template=chat_template_digest(tokenizer),
    )


def chat_template_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    return hashlib.sha256(str(tokenizer.chat_template or "").encode()).hexdigest()


def require_recorded_base(adapter: Path, base: Path) -> None:
    """Raises InputError where a checkpoint's base model has other weights than the student that was trained."""
    if not (adapter / MANIFEST_FILE).is_file():
        return
    trained = load_manifest(adapter).model("student")
    if _weights_fingerprint(base) != trained.weights:
        raise InputError(
            f"{base} has other weights than the student that the adapter {adapter} was trained on ({trained.name}).",
            f"Restore that model at {base}, or put a symbolic link to it there.",
        )


def chat_day(
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    manifest: Manifest,
    overwrite: bool,
    may_differ: Collection[str] = (),
) -> str | None:
    """The day that an artifact's chat template writes: the recorded one if the artifact is continued, else today.

    None for a template that writes no day. `manifest` is the artifact's, without its day; the others are as for
    `Writer.open`.
    """
    if not writes_day(tokenizer):
        return None
    existing = find_continued(output, manifest, overwrite, may_differ)
    if existing and (existing.day or existing.state == "complete"):
        return existing.day
    return datetime.now().astimezone().date().isoformat()


def _weights_fingerprint(directory: Path) -> str:
    """One hash of a model's files; for an adapter, of its files and its base model's."""
    files = {file for pattern in FINGERPRINTED_FILES for file in directory.glob(pattern)}
    digests = {file.name: _cached_digest(file, *_file_version(file)) for file in files}
    base = base_directory(directory)
    if base is None:
        return weights_fingerprint(directory, digests)
    require_recorded_base(directory, base)
    return weights_fingerprint(directory, digests, _weights_fingerprint(base))


def _file_version(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns


@cache
def _cached_digest(file: Path, _size: int, _mtime_ns: int) -> str:
    """The digest of one version of a file, cached because stages record a model and load it later."""
    return file_digest(file)


def require_same_tokenizer(first: ModelRecord, second: ModelRecord) -> None:
    """Raises InputError unless both models map the same ids to the same tokens."""
    if first.tokenizer == second.tokenizer:
        return
    tokens, others = (_tokens_by_id(load_tokenizer(model.name)) for model in (first, second))
    different = sorted(i for i in tokens.keys() | others.keys() if tokens.get(i) != others.get(i))
    examples = [f"{i} ({tokens.get(i)!r} against {others.get(i)!r})" for i in different[:3]]
    remedy = "Choose two models of one family; TSD-KD compares distributions over the same tokens."
    for smaller, larger, known in ((first, second, tokens), (second, first, others)):
        if known.keys().isdisjoint(different):  # tokens were added to the larger one
            remedy = (
                f"If no text needs these tokens, save the {smaller.role}'s tokenizer in the {larger.role}'s directory."
            )
    raise InputError(
        f"{first.role} {first.name} ({len(tokens)} tokens) and {second.role} {second.name} ({len(others)}) have "
        f"different tokenizers: {len(different)} ids differ, first {', '.join(examples)}.",
        remedy,
    )


def require_same_template(author: ModelRecord, model: ModelRecord) -> None:
    """Raises InputError where the model that wrote the prompts has got another chat template since.

    `author`: of the rollouts, the model whose template wrote them; `model`: the one of a later stage, which may have
    another template if its role or its weights are others.
    """
    is_same_model = (author.role, author.weights) == (model.role, model.weights)
    if is_same_model and author.chat_template != model.chat_template:
        raise InputError(
            f"The {model.role}'s chat template was changed after it wrote the prompts of the rollouts: it was "
            f"{author.chat_template[:12]} ({author.name}), and is {model.chat_template[:12]} ({model.name}).",
            "Restore the model's chat template, or run `tsdkd generate` with the new one.",
        )


def _tokens_by_id(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    return {i: token for token, i in tokenizer.get_vocab().items()}


def library_versions() -> dict[str, str]:
    """Versions of the libraries that decide the bytes of an artifact."""
    return {name: version(name) for name in ("torch", "transformers", "tokenizers", "accelerate", "pyarrow")}
