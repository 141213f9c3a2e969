"""Progress of a stage: a bar below the metrics and their history on a terminal, lines in a log."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import pairwise
from math import inf, isfinite

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.live import Live
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

BLOCKS = "▁▂▃▄▅▆▇█"
MAX_WIDTH = 60
"""Columns of a sparkline, at most."""
MAX_POINTS = 2048
"""The most points of a history; an even number."""
LABEL_WIDTH = 50
"""Columns beside a sparkline, for the metric's name, value and range."""


class ProgressLines:
    """Progress for a log: one line a minute."""

    INTERVAL = 60.0

    def __init__(self, console: Console, what: str, total: int, unit: str, done: int) -> None:
        self.console = console
        self.what, self.total, self.unit, self.done = what, total, unit, done
        self.initial = done
        self.latest: dict[str, float] = {}
        self.start = self.last_line = time.monotonic()

    def advance(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        if now - self.last_line < self.INTERVAL or not self.initial < self.done < self.total:
            return
        self.last_line = now
        rate = 60 * (self.done - self.initial) / (now - self.start)
        left = (self.total - self.done) / rate
        size, unit = (10**6, "MB") if self.unit == "bytes" else (1, self.unit)
        done, total = (f"{round(count / size):,}" for count in (self.done, self.total))
        line = f"{self.what}: {done} of {total} {unit}, {rate / size:,.1f} a minute, {left:,.0f} min left"
        metrics = "".join(f", {name} {value:.4g}" for name, value in self.latest.items())
        self.console.print(line + metrics, soft_wrap=True)

    def metrics(self, values: dict[str, float]) -> None:
        self.latest.update(values)


class MetricHistory:
    """The values of a metric: means of neighbours from `MAX_POINTS` values on; last, lowest and highest are exact."""

    def __init__(self) -> None:
        self.last, self.low, self.high = 0.0, inf, -inf
        self._means: list[float] = []
        self._rest: list[float] = []
        self._values_per_mean = 1

    def add(self, value: float) -> None:
        self.last, self.low, self.high = value, min(self.low, value), max(self.high, value)
        self._rest.append(value)
        if len(self._rest) < self._values_per_mean:
            return
        self._means.append(sum(self._rest) / self._values_per_mean)
        self._rest.clear()
        if len(self._means) == MAX_POINTS:
            self._means = [(a + b) / 2 for a, b in zip(self._means[::2], self._means[1::2], strict=True)]
            self._values_per_mean *= 2

    @property
    def points(self) -> list[float]:
        return [*self._means, *([sum(self._rest) / len(self._rest)] if self._rest else [])]


class MetricDisplay:
    """A line for each metric: last value, sparkline, lowest and highest value."""

    def __init__(self) -> None:
        self.histories: dict[str, MetricHistory] = {}

    def add(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            if isfinite(value):
                self.histories.setdefault(name, MetricHistory()).add(value)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = max(1, min(MAX_WIDTH, options.max_width - LABEL_WIDTH))
        grid = Table.grid(padding=(0, 2, 0, 0))
        for style in ("dim", "", "cyan", "dim"):
            grid.add_column(style=style, no_wrap=True)
        for name, history in self.histories.items():
            range_ = f"{history.low:.3g} to {history.high:.3g}"
            grid.add_row(name, f"{history.last:.4g}", sparkline(history.points, width), range_)
        yield grid


def sparkline(values: list[float], width: int) -> str:
    """One block for each value, or for the mean of neighbours if there are more than `width`; lowest to highest."""
    count = min(width, len(values))
    edges = [len(values) * i // count for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, span = min(means), max(means) - min(means)
    top = len(BLOCKS) - 1
    return "".join(BLOCKS[round(top * (mean - low) / span) if span else 0] for mean in means)


class RateColumn(ProgressColumn):
    """The mean rate since the start, since work ends in batches."""

    def render(self, task: Task) -> Text:
        rate = _rate(task)
        if task.fields["unit"] == "bytes":
            return Text(f"{rate / 1e6:,.1f} MB/s" if rate else "", style="cyan")
        shown, per = (rate, "s") if rate >= 1 else (60 * rate, "min")
        return Text(f"{shown:,.1f} {task.fields['unit']}/{per}" if rate else "", style="cyan")


class LeftColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        rate = _rate(task)
        left = timedelta(seconds=round((task.remaining or 0) / rate)) if rate else "-:--:--"
        return Text(f"{left} left", style="cyan")


def _rate(task: Task) -> float:
    """Units a second; 0 before the first second."""
    return (task.completed - task.fields["initial"]) / task.elapsed if task.elapsed else 0.0


@contextmanager
def progress_bar(
    console: Console, what: str, total: int, unit: str, done: int
) -> Iterator[tuple[Callable[[int], None], Callable[[dict[str, float]], None]]]:
    """A bar below the metrics, for a terminal; yields a function to advance it and one to add metrics."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn() if unit == "bytes" else MofNCompleteColumn(),
        RateColumn(),
        TimeElapsedColumn(),
        LeftColumn(),
    )
    progress, metrics = Progress(*columns), MetricDisplay()
    task = progress.add_task(what, total=total, completed=done, unit=unit, initial=done)
    with Live(Group(metrics, progress), console=console):
        yield lambda count: progress.advance(task, count), metrics.add
