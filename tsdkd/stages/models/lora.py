"""Low-rank adapters by peft: put on a student before it learns, saved or merged after."""

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from tsdkd.errors import InputError
from tsdkd.stages.config.train import LoRAConfig
from tsdkd.stages.models.load import LanguageModel


def add_lora(student: LanguageModel, config: LoRAConfig, seed: int) -> LanguageModel:
    """The student with fresh adapters, which alone require gradients. Raises InputError for unknown target modules."""
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    targets = _targets(student, config)
    set_seed(seed)  # of the adapters' first values
    settings = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    return replace(student, model=get_peft_model(student.model, settings))


def base_with_adapters(model: Any) -> Any:
    """The model that transformers knows: with its adapters at work, where it has any."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def merged_state_dict(model: Any) -> dict[str, Tensor]:
    """The weights of a model, under their names in its files, with what its adapters add to them."""
    weights = {name: value for name, value in model.state_dict().items() if ".lora_" not in name}
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight"):
            (adapter,) = module.active_adapters
            weights[f"{name}.base_layer.weight"] = module.weight + module.get_delta_weight(adapter)
    tied = set(model.all_tied_weights_keys or ())
    return {name.replace(".base_layer", ""): value for name, value in weights.items() if name not in tied}


def _targets(student: LanguageModel, config: LoRAConfig) -> str | list[str]:
    if config.targets == "all-linear":
        return config.targets
    wanted = [name.strip() for name in config.targets.split(",")]
    linear = [name for name, module in student.model.named_modules() if isinstance(module, nn.Linear)]
    known = {name.rsplit(".", 1)[-1] for name in linear}
    if unknown := [name for name in wanted if name not in known]:
        raise InputError(
            f"{student.name} has no linear modules {', '.join(unknown)}.",
            f"Choose of {', '.join(sorted(known))}, or all-linear.",
        )
    head = next(
        name for name, module in student.model.named_modules() if module is student.model.get_output_embeddings()
    )
    if head in wanted and student.model.config.get_text_config().tie_word_embeddings:
        raise InputError(
            f"{student.name} shares its output head with its embeddings: what an adapter adds to one changes both.",
            f"Leave {head} out of --lora-targets.",
        )
    if head in wanted and config.dropout:
        raise InputError(
            "Dropout before an adapter on the output head cannot be part of the objective.",
            f"Give --lora-dropout 0, or leave {head} out of --lora-targets.",
        )
    return wanted
