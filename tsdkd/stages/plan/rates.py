"""Measures the speed of this machine in about a second: matrix products and memory copies."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from tsdkd.stages.models.device import default_device, has_bfloat16

EFFICIENCY = 0.4
"""The fraction of the measured rates that whole stages reach (compared by `benchmarks/plan.py`)."""
MATRIX_SIDE = {"cpu": 1024, "cuda": 8192}
"""Rows and columns of the matrices that are multiplied."""
COPY_BYTES = {"cpu": 2**28, "cuda": 2**31}
SECONDS_PER_RATE = 0.4


@dataclass(frozen=True)
class Rates:
    """Speed of one device."""

    device: str
    dtype: str
    """Of the matrices: bfloat16 if the hardware computes in it, else float32."""
    flops_per_second: float
    bytes_per_second: float
    """Bytes read and written."""

    def seconds(self, flops: float, moved_bytes: float = 0) -> float:
        """Expected seconds: of multiplying or of moving, whichever takes longer."""
        return max(flops / self.flops_per_second, moved_bytes / self.bytes_per_second) / EFFICIENCY


def measure_rates() -> Rates:
    """Measure the default device."""
    device = default_device()
    dtype = torch.bfloat16 if has_bfloat16(device) else torch.float32
    side = MATRIX_SIDE[device]
    matrix = torch.ones(side, side, device=device, dtype=dtype)
    source = torch.ones(COPY_BYTES[device], device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    flops_per_second = 2 * side**3 / _fastest_seconds(lambda: matrix @ matrix, device)
    bytes_per_second = 2 * COPY_BYTES[device] / _fastest_seconds(lambda: target.copy_(source), device)
    return Rates(device, str(dtype).removeprefix("torch."), flops_per_second, bytes_per_second)


def _fastest_seconds(work: Callable[[], object], device: str) -> float:
    """The shortest of repeated runs, after a first run that allocates."""
    seconds: list[float] = []
    work()
    end = time.perf_counter() + SECONDS_PER_RATE
    while not seconds or time.perf_counter() < end:
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
