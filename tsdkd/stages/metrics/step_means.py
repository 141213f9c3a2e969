"""The metrics of an optimizer step: means over the responses of its micro-batches on all ranks."""

from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor


class StepMeans:
    """Sums of one rank; a sum stays on its device until the means are read."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = defaultdict(lambda: torch.tensor(0.0))
        self._counts: Counter[str] = Counter()
        """The responses that each metric is a mean over; a micro-batch with empty openers has no rank agreement."""

    def add(self, metrics: Mapping[str, Any], responses: int) -> None:
        """Take the means over a micro-batch's responses."""
        for name, value in metrics.items():
            self._counts[name] += responses
            self._sums[name] = responses * value + self._sums[name].to(getattr(value, "device", "cpu"))

    def pop(self, world_size: int) -> dict[str, float]:
        """The means over the responses of all ranks, which all must call this; the next step starts at zero."""
        own = {name: (float(total), self._counts[name]) for name, total in self._sums.items()}
        by_rank = gather_object([own]) if world_size > 1 else [own]
        means = {}
        for name in {name: None for sums in by_rank for name in sums}:
            totals, counts = zip(*(sums.get(name, (0.0, 0)) for sums in by_rank), strict=True)
            means[name] = sum(totals) / sum(counts)
        self._sums.clear()
        self._counts.clear()
        return means
