"""The student's weights on their way to vLLM: files in a directory that the ranks of a machine share.

All ranks call these functions together, because every rank takes part in gathering a sharded tensor. Only the first
rank of each machine keeps what is gathered and writes it, a file of about `FILE_BYTES` at a time.
"""

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers.core_model_loading import WeightConverter, revert_weight_conversion

from tsdkd.artifacts.locks import is_locked, lock_for_writing
from tsdkd.processes import local_rank, rank
from tsdkd.stages.models.adaptable import base_with_adapters
from tsdkd.stages.models.distributed import gather
from tsdkd.stages.models.merged_weights import merged_weights

SHARED_MEMORY = Path("/dev/shm")
NAME, UNLOCKED_NAME = "tsdkd-weights-", "tsdkd-unlocked-"
"""Prefixes of the names of directories."""
FILE_BYTES = 1 << 30


@contextmanager
def machine_directory(needed: int) -> Iterator[Path]:
    """An empty directory for this machine's ranks: in shared memory if `needed` bytes are free there.

    Removes the directories of runs that were killed: a process holds the lock of its directory until it ends.
    """
    if local_rank():
        yield Path(gather([""])[rank() - local_rank()])
        return
    shared = SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free > needed
    parent = SHARED_MEMORY if shared else Path(tempfile.gettempdir())
    for left in parent.glob(f"{NAME}*"):
        with suppress(FileNotFoundError):  # another run removes it at the same time
            if left.stat().st_uid == os.getuid() and not is_locked(left):
                shutil.rmtree(left, ignore_errors=True)
    unlocked = Path(tempfile.mkdtemp(prefix=UNLOCKED_NAME, dir=parent))
    with lock_for_writing(unlocked):
        directory = unlocked.rename(parent / unlocked.name.replace(UNLOCKED_NAME, NAME))
        try:
            yield Path(gather([str(directory)])[rank()])
        finally:
            shutil.rmtree(directory, ignore_errors=True)


def weight_bytes(model: Any, dtype: torch.dtype) -> int:
    """The bytes of a model's weights in `dtype`."""
    return sum(int(p.numel()) for p in base_with_adapters(model).parameters()) * dtype.itemsize


def maps_one_to_one(model: Any) -> bool:
    """Whether each weight in memory is one weight of the files; loading some models joins or splits weights."""
    conversions = getattr(base_with_adapters(model), "_weight_conversions", None)
    return conversions is not None and not any(isinstance(each, WeightConverter) for each in conversions)


def write_weights(model: Any, dtype: torch.dtype, directory: Path, *, merge: bool = True) -> None:
    """Write the weights as safetensors under the names of the model's files, adapters merged or left out."""
    base, kept = base_with_adapters(model), local_rank() == 0
    tied = set(base.all_tied_weights_keys or ())
    merged = merged_weights(base, merge=merge).items()
    whole = ((name, _whole(value, dtype)) for name, value in merged if name not in tied)
    on_cpu = ((name, value.cpu()) for name, value in whole if kept)
    if maps_one_to_one(model):
        weights = (item for name, value in on_cpu for item in revert_weight_conversion(base, {name: value}).items())
    else:
        weights = (item for item in revert_weight_conversion(base, dict(on_cpu)).items() if kept)
    for number, tensors in enumerate(_in_files(weights)):
        save_file(tensors, directory / f"model-{number:05d}.safetensors")


def _in_files(weights: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    tensors: dict[str, Tensor] = {}
    size = 0
    for name, value in weights:
        tensors[name], size = value.contiguous(), size + value.nbytes
        if size >= FILE_BYTES:
            yield tensors
            tensors, size = {}, 0
    if tensors:
        yield tensors


def write_adapter(model: Any, dtype: torch.dtype, directory: Path) -> None:
    """Write the adapter as peft does, for vLLM to read beside the base model."""
    base = base_with_adapters(model)
    ((name, config),) = base.peft_config.items()
    found = ((key, _whole(value, dtype).cpu()) for key, value in base.state_dict().items() if ".lora_" in key)
    tensors = {f"base_model.model.{key.replace(f'.{name}.', '.')}": value for key, value in found}
    if local_rank() == 0:
        config.save_pretrained(str(directory))
        save_file(tensors, directory / "adapter_model.safetensors")


def _whole(value: Tensor, dtype: torch.dtype) -> Tensor:
    whole = (value.full_tensor() if isinstance(value, DTensor) else value).detach()
    return whole.to(dtype) if whole.is_floating_point() else whole


def delete_files(directory: Path) -> None:
    """Delete what this machine's first rank wrote."""
    if local_rank() == 0:
        for file in directory.glob("*.safetensors"):
            file.unlink()
