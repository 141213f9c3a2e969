"""LoRA adapters in memory (peft): attached to a student before training, merged into its weights afterwards."""

from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

from tsdkd.errors import InputError, first_line
from tsdkd.stages.config.train import LoRAConfig
from tsdkd.stages.models.load import LanguageModel

REMEDY = "Choose other modules with --lora-targets, or train full weights."


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
            raise InputError(f"{student.name} has the weight of {name} in several layers.", REMEDY)
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
    modules = dict(student.model.named_modules())
    linear = {name.rsplit(".", 1)[-1] for name, module in modules.items() if isinstance(module, nn.Linear)}
    if unknown := [name for name in targets if name not in linear]:
        raise InputError(
            f"{student.name} has no linear modules {', '.join(unknown)}.",
            f"Choose from {', '.join(sorted(linear))}, or all-linear.",
        )
    head = next(name for name, module in modules.items() if module is student.model.get_output_embeddings())
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
