"""The layers of a model that adapters fit, and the model inside a peft wrapper."""

from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

UNCALLED = {"dt_proj"}
"""Layers of which Mamba, Falcon Mamba and Jamba read the weight alone, so that an adapter on them has no effect."""

MAMBA_TYPES = {"mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h"}
"""The types of models whose out_proj peft refuses: their kernels read its weight without calling it."""


def adaptable_layers(model: Any) -> dict[str, Any]:
    """The layers that an adapter fits, by their full names, with the output head."""
    excluded = unadaptable_names(model)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and name.rpartition(".")[2] not in excluded
    }


def unadaptable_names(model: Any) -> set[str]:
    """Names of linear layers that no adapter fits: those that are read without being called, and routers of experts."""
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    routers = {name.rpartition(".")[2] for name, module in linear.items() if hasattr(module, "top_k")}
    mamba = {"out_proj"} if model.config.model_type in MAMBA_TYPES else set()
    return routers | (UNCALLED | mamba) & {name.rpartition(".")[2] for name in linear}


def base_with_adapters(model: Any) -> Any:
    """The transformers model inside a peft wrapper, its adapters active; other models as they are."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
