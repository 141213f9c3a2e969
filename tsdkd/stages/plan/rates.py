"""How fast this machine is: two rates, measured in about a second, and the share of them that is reached."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from tsdkd.stages.models.device import default_device, has_bf16

EFFICIENCY = 0.4
"""Of the measured rates, what whole stages reach: `benchmarks/plan.py` compares."""
SIDE = {"cpu": 1024, "cuda": 8192}
"""Of the square matrices that are multiplied."""
COPIED = {"cpu": 2**28, "cuda": 2**31}
"""Bytes."""
PATIENCE = 0.4
"""Seconds for each rate."""


@dataclass(frozen=True)
class Rates:
    device: str
    dtype: str
    """What is multiplied: bfloat16 where the hardware computes in it."""
    flops: float
    """Of matrix products, a second."""
    bytes: float
    """Read and written, a second."""

    def seconds(self, flops: float, moved: float = 0) -> float:
        """Whichever takes longer, multiplying or moving."""
        return max(flops / self.flops, moved / self.bytes) / EFFICIENCY


def measure_rates() -> Rates:
    """Of the default device."""
    device = default_device()
    dtype = torch.bfloat16 if has_bf16(device) else torch.float32
    side = SIDE[device]
    one = torch.ones(side, side, device=device, dtype=dtype)
    source = torch.ones(COPIED[device], device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    flops = 2 * side**3 / _shortest(lambda: one @ one, device)
    moved = 2 * COPIED[device] / _shortest(lambda: target.copy_(source), device)
    return Rates(device, str(dtype).removeprefix("torch."), flops, moved)


def _shortest(work: Callable[[], object], device: str) -> float:
    """Seconds; the first time, which allocates, does not count."""
    found: list[float] = []
    work()
    end = time.perf_counter() + PATIENCE
    while not found or time.perf_counter() < end:
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return min(found)
