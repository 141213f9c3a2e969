"""Saved LoRA adapters on their base model in memory (peft)."""

import copy
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tsdkd.errors import InputError
from tsdkd.stages.models.adapters import ADAPTER_CONFIG, BASE, adapter_settings

FILE_PREFIX = "base_model.model."
"""The prefix of a module's name in an adapter's file."""


def attach_adapter(model: Any, directory: Path) -> Any:
    """peft's model of a base model with a saved adapter; its logits are peft's.

    The part of the adapter that changes the output head is merged into a head of its own.

    Raises InputError where the adapter does not fit, or holds settings or weights that peft would ignore.
    """
    from peft.utils import load_peft_weights

    _require_known_settings(directory)
    if {"cpu", "disk"} & {str(device) for device in (getattr(model, "hf_device_map", None) or {}).values()}:
        raise InputError(
            f"The base model of {directory} exceeds the GPUs, and adapters cannot be offloaded.",
            "Merge the adapter into its base model.",
        )
    try:
        weights = load_peft_weights(str(directory), device="cpu")
        _resize_vocabulary(model, weights, directory)
        adapted = _with_weights(model, weights, directory)
        _merge_into_head(model)
    except InputError:
        raise
    except Exception as error:  # peft, safetensors and torch raise errors of many types
        cause = " ".join(line.strip() for line in str(error).splitlines()[:2])
        raise _misfit(directory, cause or type(error).__name__) from None
    return adapted


def _with_weights(model: Any, weights: dict[str, Tensor], directory: Path) -> Any:
    from peft import PeftConfig, PeftModel
    from peft.utils import set_peft_model_state_dict

    config = PeftConfig.from_pretrained(str(directory))
    config.inference_mode = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are about training and saving
        adapted = PeftModel(model, config)
    result: Any = set_peft_model_state_dict(adapted, weights)
    if missing := [name for name in result.missing_keys if ".lora_" in name]:
        raise _misfit(directory, f"it has no weights for {len(missing)} modules, such as {missing[0]}")
    if unexpected := [name for name in result.unexpected_keys if not _is_copy(name, weights)]:
        raise _misfit(directory, f"{len(unexpected)} of its weights have no module there, such as {unexpected[0]}")
    return adapted


def _misfit(directory: Path, cause: str) -> InputError:
    return InputError(
        f"{directory} does not fit its base model ({cause.rstrip('.')}).",
        f"Check the base model that its {ADAPTER_CONFIG} names, and that the adapter was saved whole.",
    )


def _is_copy(name: str, weights: dict[str, Tensor]) -> bool:
    """Whether a weight is also there by its plain name: peft writes a resized embedding under three names."""
    plain = name.replace(".modules_to_save.", ".").replace(".original_module.", ".")
    return plain != name and plain in weights


def _require_known_settings(directory: Path) -> None:
    from peft import LoraConfig

    known = {field.name for field in fields(LoraConfig)} | {BASE, "peft_version"}
    unknown = [name for name, value in adapter_settings(directory).items() if value and name not in known]
    if unknown:
        raise InputError(
            f"{directory} has settings that the installed peft does not know: {', '.join(unknown)}.", "Upgrade peft."
        )


def _resize_vocabulary(model: Any, weights: dict[str, Tensor], directory: Path) -> None:
    """Give embeddings and head the number of rows that the adapter was trained with."""
    layers = {"embeddings": model.get_input_embeddings(), "head": model.get_output_embeddings()}
    names = {module: name for name, module in model.named_modules()}
    before = layers["embeddings"].weight.shape[0]
    saved = {role: _saved_rows(names[layer], before, weights, directory) for role, layer in layers.items()}
    resized = {rows for rows in saved.values() if rows is not None} - {before}
    if not resized:
        return
    tied = layers["embeddings"].weight is layers["head"].weight
    if len(set(saved.values()) - ({None} if tied else set())) > 1:
        raise _too_few_rows(directory, max(resized), before)
    model.resize_token_embeddings(resized.pop(), mean_resizing=False)


def _saved_rows(name: str, before: int, weights: dict[str, Tensor], directory: Path) -> int | None:
    """The number of rows of an embedding, or of the head, as the adapter was trained; None if it holds no row."""
    for suffix in ("weight", "base_layer.weight"):
        if (saved := weights.get(f"{FILE_PREFIX}{name}.{suffix}")) is not None:
            return int(saved.shape[0])
    if f"{FILE_PREFIX}{name}.token_adapter.trainable_tokens_delta" not in weights:
        return None
    tokens = adapter_settings(directory)["trainable_token_indices"]
    if isinstance(tokens, dict):
        tokens = next(indices for key, indices in tokens.items() if f".{name}".endswith(f".{key}"))
    rows: int = max(before, max(tokens) + 1)
    if not set(range(before, rows)) <= set(tokens):
        raise _too_few_rows(directory, rows, before)
    return rows


def _too_few_rows(directory: Path, rows: int, before: int) -> InputError:
    return InputError(
        f"{directory} was trained with {rows:,} embedding rows, its base model has {before:,}, and the adapter does "
        "not hold the others.",
        f"Name the base model with the extended vocabulary in {directory / ADAPTER_CONFIG}, as {BASE}.",
    )


def _merge_into_head(model: Any) -> None:
    """Give a model whose adapter changes its embeddings or its head a plain head of its own."""
    head = model.get_output_embeddings()
    if not (_is_adapted(head) or _is_adapted(model.get_input_embeddings())):
        return
    model.set_output_embeddings(_merged(copy.deepcopy(head)))
    model.config.get_text_config().tie_word_embeddings = False


def _is_adapted(layer: Any) -> bool:
    return hasattr(layer, "base_layer") or hasattr(layer, "original_module")


def _merged(layer: Any) -> Any:
    if hasattr(layer, "unload_and_optionally_merge_module"):  # a module that is saved whole, or single tokens
        return layer.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
    if hasattr(layer, "base_layer"):
        base = layer.get_base_layer()
        if any(layer.lora_bias.values()) and base.bias is None:
            base.bias = nn.Parameter(base.weight.new_zeros(base.out_features))
        layer.merge()
        return layer.get_base_layer()
    return layer
