"""Models by name: fingerprint, load; and the few facts about them that stages need."""

from typing import cast

import torch
from transformers import (
    PreTrainedConfig,
)

from tsdkd.stages.config.types import DType


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def has_bf16(device: str) -> bool:
    """Does the hardware compute in it, or only pretend to?"""
    return torch.cuda.is_bf16_supported() if device == "cuda" else bool(torch.cpu._is_avx512_bf16_supported())


def auto_dtype(config: PreTrainedConfig, device: str) -> DType:
    """A model's saved precision; float32 on CPUs without bf16, which are several times slower in it."""
    saved = str(config.dtype or torch.float32).removeprefix("torch.")
    return "float32" if device == "cpu" and not has_bf16(device) else cast("DType", saved)


def forward_precision(wanted: str) -> str:
    """The dtype of a training forward: "auto" is bfloat16 where the hardware computes in it, else float32."""
    if wanted != "auto":
        return wanted
    return "bfloat16" if has_bf16(default_device()) else "float32"
