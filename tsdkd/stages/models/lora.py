"""LoRA adapters in memory (peft): attached to a student before training, merged into its weights afterwards."""

from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tsdkd.errors import InputError
from tsdkd.stages.config.train import LoRAConfig
from tsdkd.stages.models.load import LanguageModel

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
    """Names of linear layers that no adapter fits: peft's, and routers, which return a choice of experts."""
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
    return replace(student, model=get_peft_model(student.model, settings))


def base_with_adapters(model: Any) -> Any:
    """The transformers model inside a peft wrapper, its adapters active; other models as they are."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def merged_state_dict(model: Any) -> dict[str, Tensor]:
    """The weights of a model with its adapters merged, under the names of the model's files."""
    weights = {name: value for name, value in model.state_dict().items() if ".lora_" not in name}
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight"):
            (adapter,) = module.active_adapters
            weights[f"{name}.base_layer.weight"] = module.weight + module.get_delta_weight(adapter)
    tied = set(model.all_tied_weights_keys or ())
    return {name.replace(".base_layer", ""): value for name, value in weights.items() if name not in tied}


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
