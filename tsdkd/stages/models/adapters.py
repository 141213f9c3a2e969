"""LoRA adapters as files: a directory with an adapter_config.json stands for its base model with the adapter."""

import json
from pathlib import Path
from typing import Any

from tsdkd.errors import InputError

ADAPTER_CONFIG = "adapter_config.json"
VLLM_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM's `max_lora_rank` accepts."""


def is_adapter(directory: Path) -> bool:
    """Raises InputError for a whole model with an adapter beside it: transformers would read both, vLLM the model."""
    if not (directory / ADAPTER_CONFIG).is_file():
        return False
    if (directory / "config.json").is_file():
        raise InputError(
            f"{directory} holds a whole model and an adapter.", f"Move the adapter ({ADAPTER_CONFIG}) elsewhere."
        )
    return True


def adapter_settings(directory: Path) -> dict[str, Any]:
    """The content of an adapter's config. Raises InputError unless it is LoRA and names its base model."""
    file = directory / ADAPTER_CONFIG
    try:
        settings: dict[str, Any] = json.loads(file.read_text())
        adapter_type, _ = settings["peft_type"], settings["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} cannot be read ({error}).", "Save the adapter again.") from None
    if adapter_type != "LORA":
        raise InputError(
            f"{directory} is an adapter of type {adapter_type}, not LORA.", "Merge the adapter into its base model."
        )
    return settings


def base_model_name(directory: Path) -> str | None:
    """The name of an adapter's base model; None for a directory that holds a whole model."""
    return str(adapter_settings(directory)["base_model_name_or_path"]) if is_adapter(directory) else None


def vllm_max_lora_rank(directory: Path) -> int:
    """vLLM's smallest `max_lora_rank` that an adapter fits. The adapter's rank may differ between layers.

    Raises InputError if the adapter's rank exceeds vLLM's largest value.
    """
    settings = adapter_settings(directory)
    rank = int(max([settings["r"], *(settings.get("rank_pattern") or {}).values()]))
    for max_rank in VLLM_LORA_RANKS:
        if rank <= max_rank:
            return max_rank
    raise InputError(
        f"{directory} has rank {rank}; vLLM serves adapters up to rank {VLLM_LORA_RANKS[-1]}.",
        "Merge the adapter into its base model.",
    )
