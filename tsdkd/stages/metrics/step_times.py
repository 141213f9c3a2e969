"""How the time of an optimizer step divides into its parts, on one rank.

On a CPU the times are those of a clock. On a GPU they are those of events on its stream, which the device records as it
reaches them: a part's kernels count for that part, and nothing waits for the device before the step is logged.
"""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal

import torch

Part = Literal["sampling", "transfer", "teacher", "student", "objective", "optimizer", "other"]
"""transfer: the weight update with its engine check; student: its forward and its backward, and other processes' wait
for gradients; objective: loss and its gradients to the hidden states; other: batches, clipping and logs."""


class StepTimes:
    """One step's changes from part to part; each moment belongs to the innermost part."""

    def __init__(self, device: torch.device) -> None:
        self._is_gpu = device.type == "cuda"
        self._changes: list[tuple[Part, Any]] = []

    def start(self) -> None:
        """Begin a step; `timed` counts for it until `pop`."""
        self._changes = [("other", self._now())]
        _running.set(self)

    @contextmanager
    def part(self, name: Part) -> Iterator[None]:
        outer, _ = self._changes[-1]
        self._changes.append((name, self._now()))
        try:
            yield
        finally:
            self._changes.append((outer, self._now()))

    def pop(self) -> dict[str, float]:
        """End the step. Returns the seconds of each part that occurred, and of the "whole" step."""
        _running.set(None)
        ends = [*(now for _, now in self._changes[1:]), self._now()]
        seconds: dict[str, float] = defaultdict(float)
        for (name, start), end in zip(self._changes, ends, strict=True):
            seconds[name] += self._seconds(start, end)
        return seconds | {"whole": sum(seconds.values())}

    def _now(self) -> Any:
        if not self._is_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, start: Any, end: Any) -> float:
        if not self._is_gpu:
            return float(end - start)
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000


_running: ContextVar[StepTimes | None] = ContextVar("step_times", default=None)


@contextmanager
def timed(name: Part) -> Iterator[None]:
    """Count the work inside for a part of the step that runs in this thread, if one runs."""
    running = _running.get()
    if running is None:
        yield
        return
    with running.part(name):
        yield
