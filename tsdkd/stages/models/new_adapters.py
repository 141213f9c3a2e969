"""New LoRA adapters (peft): added to a student for training, and saved."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tsdkd.errors import InputError, first_line
from tsdkd.stages.config.train import LoRAConfig
from tsdkd.stages.models.adaptable import adaptable_layers, base_with_adapters, unadaptable_names
from tsdkd.stages.models.language_model import LanguageModel

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
        exclude_modules=sorted(unadaptable_names(student.model)) or None,
        task_type="CAUSAL_LM",
    )
    try:
        adapted = replace(student, model=get_peft_model(student.model, settings))
    except ValueError as error:  # layers that peft does not adapt, such as Mamba's
        raise InputError(f"peft cannot adapt {student.name} ({first_line(error)}).", REMEDY) from None
    _require_mergeable(adapted)
    return adapted


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


def save_adapter(model: Any, student: LanguageModel, directory: Path) -> None:
    """Save the trained adapter of a student. It names its base by an absolute path, or a hub id and its revision."""
    (config,) = model.peft_config.values()
    base, loaded_from = Path(student.name).expanduser(), Path(base_with_adapters(student.model).name_or_path)
    local = base.is_dir()
    config.base_model_name_or_path = str(base.resolve()) if local else student.name
    config.revision = None if local else loaded_from.name  # the snapshot, named after its commit
    for name, value in vars(config).items():  # peft keeps names in sets, whose order differs between processes
        if isinstance(value, set):
            setattr(config, name, sorted(value))
    model.save_pretrained(directory, save_embedding_layers=False)  # the embeddings are the base model's
