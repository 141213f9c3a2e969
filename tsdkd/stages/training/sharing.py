"""One optimizer batch over several processes: who trains on which samples, and what all of them must agree on.

With one process nothing here changes anything: same order, same batches, same openers.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import torch
from accelerate import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils import gather_object
from peft import PeftModel, get_peft_model
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from tsdkd.core import AdaptiveOpener
from tsdkd.errors import InputError
from tsdkd.stages.models import LanguageModel


class MicroBatches(torch.utils.data.Sampler[list[int]]):
    """One process's micro-batches of an epoch, as indices of samples.

    The shuffled order depends on seed and epoch alone. Every `processes * size` samples in it are one micro-batch of
    each process; at the end of an epoch a process may get a smaller one, or an empty one.
    """

    def __init__(self, samples: int, size: int, seed: int, rank: int, processes: int) -> None:
        self.samples, self.size, self.seed, self.rank, self.processes = samples, size, seed, rank, processes
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(range(0, self.samples, self.size * self.processes))

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.samples, generator=generator).tolist()
        for start in range(0, self.samples, self.size * self.processes):
            mine = start + self.rank * self.size
            yield order[mine : mine + self.size]


class Loader(torch.utils.data.DataLoader[Any]):
    """A loader that tells its `MicroBatches` the epoch."""

    def set_epoch(self, epoch: int) -> None:
        cast("MicroBatches", self.batch_sampler).set_epoch(epoch)


class SharedOpener(AdaptiveOpener):
    """The adaptive opener over all processes' samples in their order; every process must ask, if only with none."""

    def choose(self, signals: list[float]) -> list[float]:
        before, total = 0, []
        for rank, others in enumerate(gather_object([signals])):
            before += len(others) if rank < torch.distributed.get_rank() else 0
            total += others
        return super().choose(total)[before : before + len(signals)]


def require_known(distributed: DistributedType, fsdp: FullyShardedDataParallelPlugin | None) -> None:
    """Raise InputError where weights would be shared out in a way that the objective does not see through."""
    if distributed == DistributedType.DEEPSPEED or (fsdp and fsdp.fsdp_version != 2):
        raise InputError(
            f"Training under {'DeepSpeed' if fsdp is None else 'FSDP1'} is not supported.",
            "Configure accelerate with FSDP and fsdp_version 2, or with neither (each process holds all weights).",
        )


def whole(student: LanguageModel) -> LanguageModel:
    """The student with all weights in this process, which may call it as often as it likes.

    A copy where FSDP2 shards it, else itself; all processes must ask.
    """
    model: Any = student.model
    if not any(isinstance(part, FSDPModule) for part in model.modules()):
        return student
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    weights = {
        name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in base.state_dict().items()
    }
    devices = [student.device] if student.device.type == "cuda" else []
    with torch.device(student.device), torch.random.fork_rng(devices):
        copy = AutoModelForCausalLM.from_config(base.config, dtype=base.dtype)
    copy.generation_config = base.generation_config
    adapters = [get_peft_model(copy, config) for config in getattr(base, "peft_config", {}).values()]
    copy.load_state_dict(weights)
    return replace(student, model=(adapters[0] if isinstance(model, PeftModel) else copy).eval())
