"""Training on several ranks: the supported strategies, and a sharded student gathered on each rank."""

from dataclasses import replace
from typing import Any, TypeVar

import torch
from accelerate import DistributedType, FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import gather_object
from peft import PeftModel, get_peft_model
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from tsdkd.errors import InputError
from tsdkd.processes import world_size
from tsdkd.stages.models.language_model import LanguageModel

T = TypeVar("T")


def gather(values: list[T]) -> list[T]:
    """The lists of all ranks, joined in the order of the ranks. All ranks must call it together."""
    return list(gather_object(values)) if world_size() > 1 else values


def wait_for_all_ranks() -> None:
    PartialState().wait_for_everyone()


def require_supported_strategy(strategy: DistributedType, fsdp: FullyShardedDataParallelPlugin | None) -> None:
    """Raises InputError for FSDP1 and DeepSpeed: the loss needs whole rows of the head."""
    if strategy == DistributedType.DEEPSPEED or (fsdp and fsdp.fsdp_version != 2):
        raise InputError(
            f"Training under {'DeepSpeed' if fsdp is None else 'FSDP1'} is not supported.",
            "Configure accelerate with FSDP and fsdp_version 2, or without sharding (each rank holds all weights).",
        )


def unsharded(student: LanguageModel) -> LanguageModel:
    """The student with all weights on this rank, so that ranks can make different numbers of forward calls.

    Returns a copy if FSDP2 shards the student, else the student itself. All ranks must call this function together.
    """
    model: Any = student.model
    if not any(isinstance(module, FSDPModule) for module in model.modules()):
        return student
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    weights = {
        name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in base.state_dict().items()
    }
    devices = [student.device] if student.device.type == "cuda" else []
    with torch.device(student.device), torch.random.fork_rng(devices):
        copy = AutoModelForCausalLM.from_config(base.config, dtype=base.dtype, trust_remote_code=False)
    copy.generation_config = base.generation_config
    adapters = [get_peft_model(copy, config) for config in getattr(base, "peft_config", {}).values()]
    copy.load_state_dict(weights)
    return replace(student, model=(adapters[0] if isinstance(model, PeftModel) else copy).eval())
