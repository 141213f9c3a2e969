"""The device of this process: its kind, its memory, and the precisions that it computes in."""

import gc
from typing import cast

import psutil
import torch
from transformers import PreTrainedConfig

from tsdkd.errors import InputError
from tsdkd.stages.config.types import DType


def default_device() -> str:
    """The kind of device that models run on: "cuda" or "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def require_device(name: str) -> None:
    """Raises InputError for a device that models cannot run on, and for one that this machine does not have."""
    existing = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    try:
        device = torch.device(name)
        exists = f"{device.type}:{device.index or 0}" in {*existing, "cpu:0"}
    except RuntimeError:
        exists = False
    if not exists:
        raise InputError(f"This machine has no device {name} for models.", f"Choose from: {', '.join(existing)}.")


def free_memory() -> None:
    """Free the memory of models that nothing refers to."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def has_bfloat16(device: str) -> bool:
    """Whether the hardware computes in bfloat16 without emulation."""
    return torch.cuda.is_bf16_supported() if device == "cuda" else bool(torch.cpu._is_avx512_bf16_supported())


def auto_dtype(config: PreTrainedConfig, device: str) -> DType:
    """The precision of a model's saved weights; float32 on a CPU without bfloat16, where float32 is faster."""
    saved = str(config.dtype or torch.float32).removeprefix("torch.")
    return "float32" if device == "cpu" and not has_bfloat16(device) else cast("DType", saved)


def forward_precision(precision: str) -> str:
    """The dtype of a training forward pass: "auto" is bfloat16 if the hardware computes in it, else float32."""
    if precision != "auto":
        return precision
    return "bfloat16" if has_bfloat16(default_device()) else "float32"


def available_memory(device: str) -> int:
    """Free bytes."""
    return int(torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available)


def total_memory(device: str) -> int:
    """Bytes, free or in use."""
    return int(torch.cuda.mem_get_info()[1] if device == "cuda" else psutil.virtual_memory().total)
