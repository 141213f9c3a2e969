"""Optimizers of training by transformers' names: what each needs, and the size of its states."""

from dataclasses import dataclass
from math import ceil, prod
from typing import Literal

OptimizerName = Literal[
    "adamw_torch_fused", "adamw_torch", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "adafactor"
]
FLOAT32_BYTES = 4
BLOCK_8BIT = 256
"""State values of bitsandbytes that share a scale."""
SMALLEST_8BIT = 4096
"""Weights of fewer values have float32 states in bitsandbytes."""


@dataclass(frozen=True)
class Optimizer:
    eight_bits: bool = False
    """The states of large weights have 8 bits a value; those of embeddings stay float32, as Trainer decides."""
    bitsandbytes: bool = False
    """bitsandbytes implements it."""
    paged: bool = False
    """States leave the GPU when its memory is short."""
    sharded: bool = False
    """It works on weights that FSDP2 shards."""
    unpaged: OptimizerName = "adamw_torch_fused"
    """The optimizer to choose on a machine without a GPU, for one that is paged."""


OPTIMIZERS: dict[OptimizerName, Optimizer] = {
    "adamw_torch_fused": Optimizer(sharded=True),
    "adamw_torch": Optimizer(sharded=True),
    "adamw_8bit": Optimizer(eight_bits=True, bitsandbytes=True),
    "paged_adamw_8bit": Optimizer(eight_bits=True, bitsandbytes=True, paged=True, unpaged="adamw_8bit"),
    "paged_adamw_32bit": Optimizer(bitsandbytes=True, paged=True),
    "adafactor": Optimizer(),
}
DEFAULT_OPTIMIZER: OptimizerName = "adamw_torch_fused"


def state_bytes(name: OptimizerName, shape: tuple[int, ...], *, embedding: bool = False) -> int:
    """Bytes of the states of one weight. `embedding`: whether it is an embedding, which may also be the output head."""
    values = prod(shape)
    if name == "adafactor" and len(shape) > 1:  # means over rows and over columns
        return FLOAT32_BYTES * (values // shape[-1] + values // shape[-2])
    if name == "adafactor":
        return FLOAT32_BYTES * values
    if OPTIMIZERS[name].eight_bits and values >= SMALLEST_8BIT and not embedding:
        return 2 * (values + FLOAT32_BYTES * ceil(values / BLOCK_8BIT))
    return 2 * FLOAT32_BYTES * values
