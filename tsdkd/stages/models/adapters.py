"""LoRA adapters in place of a model: a directory with an adapter_config.json that names the model it belongs to."""

import json
from pathlib import Path
from typing import Any

from tsdkd.errors import InputError

ADAPTER_CONFIG = "adapter_config.json"
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Sizes that vLLM has room for."""


def is_adapter(directory: Path) -> bool:
    return (directory / ADAPTER_CONFIG).is_file() and not (directory / "config.json").is_file()


def adapter_settings(directory: Path) -> dict[str, Any]:
    """An adapter's own settings. Raises InputError unless it is LoRA and names its base."""
    try:
        settings: dict[str, Any] = json.loads((directory / ADAPTER_CONFIG).read_text())
        kind, _ = settings["peft_type"], settings["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{directory / ADAPTER_CONFIG} cannot be read ({error}).", "Save the adapter again.") from None
    if kind != "LORA":
        raise InputError(f"{directory} is an adapter of type {kind}, not LORA.", "Merge it into its model.")
    return settings


def base_model_name(directory: Path) -> str | None:
    """The model an adapter belongs to, by name; None where `directory` is a model of its own."""
    return str(adapter_settings(directory)["base_model_name_or_path"]) if is_adapter(directory) else None


def vllm_max_lora_rank(directory: Path) -> int:
    """The least of vLLM's sizes that an adapter fits in: a pattern may give single layers another rank than the rest.

    Raises InputError when none is large enough.
    """
    settings = adapter_settings(directory)
    rank = int(max([settings["r"], *(settings.get("rank_pattern") or {}).values()]))
    room = next((size for size in VLLM_RANKS if size >= rank), None)
    if room is None:
        raise InputError(
            f"{directory} has rank {rank}; vLLM serves adapters up to {VLLM_RANKS[-1]}.",
            "Merge the adapter into its model.",
        )
    return room
