"""One optimizer batch over several processes: who trains on which samples, and what all of them must agree on.

With one process nothing here changes anything: same order, same batches, same openers.
"""

from collections.abc import Iterator
from typing import Any, cast

import torch
from accelerate.utils import gather_object

from tsdkd.core import AdaptiveOpener


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


class EpochLoader(torch.utils.data.DataLoader[Any]):
    """A loader that tells its `MicroBatches` the epoch."""

    def set_epoch(self, epoch: int) -> None:
        cast("MicroBatches", self.batch_sampler).set_epoch(epoch)


class DistributedOpener(AdaptiveOpener):
    """The adaptive opener over all processes' samples in their order; every process must ask, if only with none."""

    def choose(self, signals: list[float]) -> list[float]:
        before, total = 0, []
        for rank, others in enumerate(gather_object([signals])):
            before += len(others) if rank < torch.distributed.get_rank() else 0
            total += others
        return super().choose(total)[before : before + len(signals)]
