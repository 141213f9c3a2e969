"""How ranks divide an optimizer batch, and the adaptive opener over the samples of all ranks.

Optimizer batches and openers do not depend on the number of ranks.
"""

from collections.abc import Iterator
from typing import Any, cast

import torch
from accelerate.utils import gather_object

from tsdkd.core import AdaptiveOpener


class MicroBatches(torch.utils.data.Sampler[list[int]]):
    """One rank's micro-batches of an epoch, as indices of samples.

    Seed and epoch alone decide the shuffled order. Every `world_size * size` samples of it make one micro-batch of each
    rank; at the end of an epoch a rank may get a smaller micro-batch, or an empty one.
    """

    def __init__(self, samples: int, size: int, seed: int, rank: int, world_size: int) -> None:
        self.samples, self.size, self.seed, self.rank, self.world_size = samples, size, seed, rank, world_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(range(0, self.samples, self.size * self.world_size))

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.samples, generator=generator).tolist()
        for start in range(0, self.samples, self.size * self.world_size):
            first = start + self.rank * self.size
            yield order[first : first + self.size]


class EpochLoader(torch.utils.data.DataLoader[Any]):
    """A loader that passes the epoch on to its `MicroBatches`."""

    def set_epoch(self, epoch: int) -> None:
        cast("MicroBatches", self.batch_sampler).set_epoch(epoch)


class DistributedOpener(AdaptiveOpener):
    """The adaptive opener over the samples of all ranks, in rank order.

    Every rank must call `choose` equally often; a rank without samples passes an empty list.
    """

    def choose(self, signals: list[float]) -> list[float]:
        signals_by_rank = gather_object([signals])
        before = sum(map(len, signals_by_rank[: torch.distributed.get_rank()]))
        fractions = super().choose([signal for rank_signals in signals_by_rank for signal in rank_signals])
        return fractions[before : before + len(signals)]
