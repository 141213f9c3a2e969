"""LoRA adapters as files: a directory with an adapter_config.json stands for its base model with the adapter."""

import re
from pathlib import Path
from typing import Any

from tsdkd.artifacts.json_files import conform, read_json
from tsdkd.errors import InputError

ADAPTER_CONFIG = "adapter_config.json"
BASE = "base_model_name_or_path"
"""The key of an adapter's config that names its base model."""
WHOLE_MODEL_FILES = ("model*.safetensors", "pytorch_model*.bin")
VLLM_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM's `max_lora_rank` accepts."""
SERVED_BY_VLLM = {
    "r", "lora_alpha", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern",
    "alpha_pattern", "use_rslora", "lora_dropout", "init_lora_weights", "task_type", "peft_type", "peft_version",
    "inference_mode", "revision", "auto_mapping", BASE,
}  # fmt: skip
"""LoRA settings that vLLM supports, or that have no effect after training."""
PLAIN_INITIALISATIONS = {True, False, "gaussian", "eva", "orthogonal"}
"""Initialisations that leave the base model's weights as they are."""
LAYER_TENSOR = re.compile(r"\.\d+\..*\.lora_[AB]\.weight$")
"""The name of a tensor inside a numbered layer."""


def is_adapter(directory: Path) -> bool:
    """Whether a directory holds an adapter. A config.json beside it may be the base model's.

    Raises InputError if it also holds a whole model: libraries choose differently between the two.
    """
    if not (directory / ADAPTER_CONFIG).is_file():
        return False
    if whole := [file.name for pattern in WHOLE_MODEL_FILES for file in directory.glob(pattern)]:
        raise InputError(
            f"{directory} holds an adapter and a whole model ({whole[0]}).", "Move one of them to another directory."
        )
    return True


def adapter_settings(directory: Path) -> dict[str, Any]:
    """The content of an adapter's config. Raises InputError unless it is LoRA and names its base model."""
    file = directory / ADAPTER_CONFIG
    settings: dict[str, Any] = read_json(file, dict[str, Any], "Save the adapter again.")
    try:
        adapter_type, base = (conform(dict(settings)[name], str | None, name) for name in ("peft_type", BASE))
    except (KeyError, ValueError) as error:
        raise InputError(f"{file} cannot be read ({error}).", "Save the adapter again.") from None
    if adapter_type != "LORA":
        raise InputError(
            f"{directory} is an adapter of type {adapter_type}, not LORA.", "Merge the adapter into its base model."
        )
    if not base:
        raise InputError(f"{file} names no base model.", f"Write its path or hub id into {file}, as {BASE}.")
    if settings.get("alora_invocation_tokens"):
        raise InputError(
            f"{directory} is an activated LoRA (alora_invocation_tokens), which tsdkd does not support.",
            "Use an adapter without that setting.",
        )
    if str(settings.get("init_lora_weights")).startswith("pissa_niter"):
        raise InputError(
            f"{directory} was initialised by randomised PiSSA, whose base weights cannot be restored.",
            "Convert it with peft (path_initial_model_for_weight_conversion), or merge it where it was trained.",
        )
    return settings


def vllm_max_lora_rank(directory: Path) -> int | None:
    """vLLM's smallest `max_lora_rank` that an adapter fits; None for an adapter that vLLM cannot serve as it is.

    The adapter's rank may differ between layers.
    """
    from peft import LoraConfig

    settings, defaults = adapter_settings(directory), LoraConfig()
    others = settings.keys() - SERVED_BY_VLLM
    if any((settings[name] or None) != (getattr(defaults, name, None) or None) for name in others):
        return None
    if settings.get("init_lora_weights", True) not in PLAIN_INITIALISATIONS:
        return None
    if not all(map(LAYER_TENSOR.search, _tensor_names(directory))):
        return None
    rank = int(max([settings["r"], *(settings.get("rank_pattern") or {}).values()]))
    return next((max_rank for max_rank in VLLM_LORA_RANKS if rank <= max_rank), None)


def _tensor_names(directory: Path) -> list[str]:
    from peft.utils import load_peft_weights

    return list(load_peft_weights(str(directory), device="cpu"))
