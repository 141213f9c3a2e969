"""What a stage at work shows: a bar and, while a student learns, its measures with their course; or lines for a log."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import pairwise
from math import inf, isfinite

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.live import Live
from rich.markup import escape
from rich.progress import (
    BarColumn,
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
WIDEST = 60
"""Columns of a sparkline, at most."""
MOST = 2048
"""Points that are kept of a measure, an even number."""
BESIDE = 50
"""Columns that a measure's name, value and range take beside it."""


class ProgressLines:
    """Progress for a log: a line a minute."""

    EVERY = 60.0

    def __init__(self, console: Console, what: str, total: int, unit: str, done: int) -> None:
        self.console = console
        self.what, self.total, self.unit, self.done = what, total, unit, done
        self.before = done
        self.latest: dict[str, float] = {}
        self.start = self.said = time.monotonic()

    def advance(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        if now - self.said < self.EVERY or not self.before < self.done < self.total:
            return
        self.said = now
        rate = 60 * (self.done - self.before) / (now - self.start)
        left = (self.total - self.done) / rate
        line = f"{self.what}: {self.done:,} of {self.total:,} {self.unit}, {rate:,.1f} a minute, {left:,.0f} min left"
        measures = "".join(f", {name} {value:.4g}" for name, value in self.latest.items())
        self.console.print(escape(line + measures), soft_wrap=True)

    def measures(self, values: dict[str, float]) -> None:
        self.latest.update(values)


class MetricHistory:
    """A measure so far: means of neighbours once there are `MOST` values; where it stands and its range are exact."""

    def __init__(self) -> None:
        self.last, self.low, self.high = 0.0, inf, -inf
        self._means: list[float] = []
        self._rest: list[float] = []
        self._each = 1

    def add(self, value: float) -> None:
        self.last, self.low, self.high = value, min(self.low, value), max(self.high, value)
        self._rest.append(value)
        if len(self._rest) < self._each:
            return
        self._means.append(sum(self._rest) / self._each)
        self._rest.clear()
        if len(self._means) == MOST:
            self._means = [(a + b) / 2 for a, b in zip(self._means[::2], self._means[1::2], strict=True)]
            self._each *= 2

    @property
    def points(self) -> list[float]:
        return [*self._means, *([sum(self._rest) / len(self._rest)] if self._rest else [])]


class MetricDisplay:
    """Every measure on a line: where it stands, its course so far, and the lowest and highest it was."""

    def __init__(self) -> None:
        self.courses: dict[str, MetricHistory] = {}

    def add(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            if isfinite(value):
                self.courses.setdefault(name, MetricHistory()).add(value)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = max(1, min(WIDEST, options.max_width - BESIDE))
        grid = Table.grid(padding=(0, 2, 0, 0))
        for style in ("dim", "", "cyan", "dim"):
            grid.add_column(style=style, no_wrap=True)
        for name, course in self.courses.items():
            range_ = f"{course.low:.3g} to {course.high:.3g}"
            grid.add_row(name, f"{course.last:.4g}", sparkline(course.points, width), range_)
        yield grid


def sparkline(values: list[float], width: int) -> str:
    """One block a value, or the mean of neighbours where there are more than `width`; lowest to highest."""
    count = min(width, len(values))
    edges = [len(values) * i // count for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, span = min(means), max(means) - min(means)
    top = len(BLOCKS) - 1
    return "".join(BLOCKS[round(top * (mean - low) / span) if span else 0] for mean in means)


class RateColumn(ProgressColumn):
    """Over all of the time: work that ends in batches has no other."""

    def render(self, task: Task) -> Text:
        pace = _pace(task)
        each, per = (pace, "s") if pace >= 1 else (60 * pace, "min")
        return Text(f"{each:,.1f} {task.fields['unit']}/{per}" if pace else "", style="cyan")


class LeftColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        pace = _pace(task)
        left = timedelta(seconds=round((task.remaining or 0) / pace)) if pace else "-:--:--"
        return Text(f"{left} left", style="cyan")


def _pace(task: Task) -> float:
    """Units a second, 0 where that is not known yet."""
    return (task.completed - task.fields["before"]) / task.elapsed if task.elapsed else 0.0


@contextmanager
def progress_bar(
    console: Console, what: str, total: int, unit: str, done: int
) -> Iterator[tuple[Callable[[int], None], Callable[[dict[str, float]], None]]]:
    """A bar under the measures, on a terminal; yields what tells it of units done, and of measures."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        RateColumn(),
        TimeElapsedColumn(),
        LeftColumn(),
    )
    progress, measures = Progress(*columns), MetricDisplay()
    task = progress.add_task(what, total=total, completed=done, unit=unit, before=done)
    with Live(Group(measures, progress), console=console):
        yield lambda count: progress.advance(task, count), measures.add
