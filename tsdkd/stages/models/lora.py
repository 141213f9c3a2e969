"""LoRA adapters in memory (peft): new ones for training, saved ones on their base model, merged weights."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion
from transformers.pytorch_utils import Conv1D

from tsdkd.errors import InputError, first_line
from tsdkd.stages.config.train import LoRAConfig
from tsdkd.stages.models.adapters import ADAPTER_CONFIG, BASE, adapter_settings

if TYPE_CHECKING:
    from tsdkd.stages.models.load import LanguageModel

FILE_PREFIX = "base_model.model."
"""The prefix of a module's name in an adapter's file."""

REMEDY = "Choose other modules with --lora-targets, or train full weights."

MAMBA_TYPES = {"mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h"}
"""The types of models whose out_proj peft refuses: their kernels read its weight without calling it."""


def adaptable_layers(model: Any) -> dict[str, Any]:
    """The layers that an adapter fits, by their full names, with the output head."""
    excluded = _unadaptable_names(model)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and name.rpartition(".")[2] not in excluded
    }


def _unadaptable_names(model: Any) -> set[str]:
    """Names of linear layers that no adapter fits: those that peft refuses, and routers, which choose experts."""
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    routers = {name.rpartition(".")[2] for name, module in linear.items() if hasattr(module, "top_k")}
    return routers | ({"out_proj"} if model.config.model_type in MAMBA_TYPES else set())


def add_lora(student: LanguageModel, config: LoRAConfig, seed: int) -> LanguageModel:
    """The student with new adapters; only their weights require gradients. Raises InputError for unusable targets."""
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    targets = _target_modules(student, config)
    set_seed(seed)  # for the adapters' initial weights
    settings = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets,
        exclude_modules=sorted(_unadaptable_names(student.model)) or None,
        task_type="CAUSAL_LM",
    )
    try:
        adapted = replace(student, model=get_peft_model(student.model, settings))
    except ValueError as error:  # layers that peft does not adapt, such as Mamba's
        raise InputError(f"peft cannot adapt {student.name} ({first_line(error)}).", REMEDY) from None
    _require_mergeable(adapted)
    return adapted


def _require_mergeable(student: LanguageModel) -> None:
    """Raises InputError unless the model runs with its adapters, and each is added to a weight of its own.

    Merged adapters of one weight in several layers would be added to each other.
    """
    adapted = {
        name: module
        for name, module in base_with_adapters(student.model).named_modules(remove_duplicate=False)
        if hasattr(module, "get_delta_weight")
    }
    number = Counter(id(_base_weight(module)) for module in adapted.values())
    for name, module in adapted.items():
        if number[id(_base_weight(module))] > 1:
            raise InputError(
                f"{student.name} shares the weight of {name} between several layers, so adapters cannot be merged.",
                REMEDY,
            )
    student.model.eval()
    probe = torch.arange(4, device=student.device).unsqueeze(0)
    try:
        with torch.no_grad():
            student.hidden(probe, torch.ones_like(probe))
    except Exception as error:  # peft and models raise errors of many types
        raise InputError(f"{student.name} does not run with these adapters ({first_line(error)}).", REMEDY) from None


def _base_weight(module: Any) -> Tensor:
    """The weight that an adapter is added to."""
    weight: Tensor = getattr(module.get_base_layer(), getattr(module, "parameter_name", "weight"))
    return weight


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
    if unexpected := [name for name in result.unexpected_keys if _saved_name(name) not in weights]:
        raise _misfit(directory, f"{len(unexpected)} of its weights have no module there, such as {unexpected[0]}")
    return adapted


def _misfit(directory: Path, cause: str) -> InputError:
    return InputError(
        f"{directory} does not fit its base model ({cause.rstrip('.')}).",
        f"Check the base model that its {ADAPTER_CONFIG} names, and that the adapter was saved whole.",
    )


def save_adapter(model: Any, student: LanguageModel, directory: Path) -> None:
    """Save the trained adapter of a student. It names its base by an absolute path, or a hub id and its revision."""
    (config,) = model.peft_config.values()
    base, loaded_from = Path(student.name).expanduser(), Path(base_with_adapters(student.model).name_or_path)
    local = base.is_dir()
    config.base_model_name_or_path = str(base.resolve()) if local else student.name
    config.revision = None if local else loaded_from.name  # the snapshot, named after its commit
    model.save_pretrained(directory, save_embedding_layers=False)  # the embeddings are the base model's


def _saved_name(name: str) -> str:
    """peft writes a resized embedding three times, under the names of its wrapper too."""
    return name.replace(".modules_to_save.", ".").replace(".original_module.", ".")


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


def base_with_adapters(model: Any) -> Any:
    """The transformers model inside a peft wrapper, its adapters active; other models as they are."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def merged_state_dict(model: Any) -> dict[str, Tensor]:
    """The weights of a model with its adapters merged, under the names of the model's files."""
    weights = {name: value for name, value in model.state_dict().items() if ".lora_" not in name}
    for name, module in model.named_modules(remove_duplicate=False):
        if hasattr(module, "get_delta_weight"):
            (adapter,) = module.active_adapters
            base, path, parameter = module, name, getattr(module, "parameter_name", "weight")
            while hasattr(base, "base_layer"):
                base, path = base.base_layer, f"{path}.base_layer"
            weights[f"{path}.{parameter}"] = getattr(base, parameter) + module.get_delta_weight(adapter)
    tied = set(model.all_tied_weights_keys or ())
    merged = {name.replace(".base_layer", ""): value for name, value in weights.items() if name not in tied}
    return dict(revert_weight_conversion(model, merged))


def _target_modules(student: LanguageModel, config: LoRAConfig) -> str | list[str]:
    if config.targets == "all-linear":
        return config.targets
    targets = [name.strip() for name in config.targets.split(",")]
    layers = adaptable_layers(student.model)
    names = {name.rpartition(".")[2] for name in layers}
    if unknown := [name for name in targets if name not in names]:
        raise InputError(
            f"{student.name} has no linear modules {', '.join(unknown)} that an adapter fits.",
            f"Choose from {', '.join(sorted(names))}, or all-linear.",
        )
    head = next(name for name, module in layers.items() if module is student.model.get_output_embeddings())
    if head in targets and student.model.config.get_text_config().tie_word_embeddings:
        raise InputError(
            f"{student.name} shares its output head with its embeddings: an adapter on one changes both.",
            f"Leave {head} out of --lora-targets.",
        )
    if head in targets and config.dropout:
        raise InputError(
            "The objective does not support dropout before an adapter on the output head.",
            f"Give --lora-dropout 0, or leave {head} out of --lora-targets.",
        )
    return targets
