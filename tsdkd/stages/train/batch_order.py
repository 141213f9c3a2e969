"""How ranks divide an optimizer batch into micro-batches, and the adaptive opener over the samples of all ranks.

Optimizer batches and openers do not depend on the number of ranks.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from typing import Any, cast

import torch
from accelerate.utils import gather_object

from tsdkd.core import AdaptiveOpener
from tsdkd.stages.data.batches import Batch, consecutive_blocks, even_batches
from tsdkd.stages.data.source import Sample


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

    def of_step(self, step: int, per_step: int) -> list[list[int]]:
        """The micro-batches of an optimizer step, counted from 0 over all epochs; the last of an epoch has fewer."""
        epoch, number = divmod(step, -(-len(self) // per_step))
        batches = MicroBatches(self.samples, self.size, self.seed, self.rank, self.world_size)
        batches.set_epoch(epoch)
        return list(islice(batches, number * per_step, (number + 1) * per_step))

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.samples, generator=generator).tolist()
        for start in range(0, self.samples, self.size * self.world_size):
            first = start + self.rank * self.size
            yield order[first : first + self.size]


class LazyBatches(Sequence[Batch]):
    """Micro-batches whose tensors are made, and whose scores are read from disk, one micro-batch at a time."""

    def __init__(self, samples: list[list[Sample]], collate: Callable[[list[Sample]], Batch]) -> None:
        self.samples = samples
        self._collate = collate

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: Any) -> Any:
        return self._collate(self.samples[index])


def pack_samples(lengths: Sequence[int], tokens: int, rank: int, world_size: int, *, in_order: bool) -> list[list[int]]:
    """One rank's packed micro-batches of an optimizer batch, as indices of samples; some may be empty.

    Every rank gets as many micro-batches, of about equal numbers of tokens. `in_order`: round by round, the
    micro-batches of all ranks hold the samples in their order, as the adaptive opener needs it.
    """
    if in_order:
        batches = [list(block) for block in consecutive_blocks(lengths, tokens)]
        batches += [[] for _ in range(-len(batches) % world_size)]
    else:
        batches = even_batches(lengths, tokens, world_size)
    return batches[rank::world_size]


def grouped(samples: list[Sample], like: Sequence[Sequence[Any]]) -> list[list[Sample]]:
    """All samples, in groups of the sizes of those of `like`."""
    remaining = iter(samples)
    return [[next(remaining) for _ in group] for group in like]


class EpochLoader(torch.utils.data.DataLoader[Any]):
    """A loader that passes the epoch on to its `MicroBatches`."""

    def set_epoch(self, epoch: int) -> None:
        cast("MicroBatches", self.batch_sampler).set_epoch(epoch)


class DistributedOpener(AdaptiveOpener):
    """The adaptive opener over the samples of all ranks, in rank order.

    All ranks must call `update` the same number of times; a rank without samples passes an empty list.
    """

    def update(self, uncertainties: list[float]) -> list[float]:
        uncertainties_by_rank = gather_object([uncertainties])
        before = sum(map(len, uncertainties_by_rank[: torch.distributed.get_rank()]))
        fractions = super().update(list(chain.from_iterable(uncertainties_by_rank)))
        return fractions[before : before + len(uncertainties)]
