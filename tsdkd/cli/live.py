"""What a stage at work shows: a bar and, while a student learns, its measures with their course; or lines for a log."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from math import isfinite

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
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

BLOCKS = "▁▂▃▄▅▆▇█"
WIDEST = 60
"""Columns of a sparkline, at most."""
BESIDE = 50
"""Columns that a measure's name, value and range take beside it."""


class Lines:
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


class Measures:
    """Every measure on a line: where it stands, its course so far, and the lowest and highest it was."""

    def __init__(self) -> None:
        self.history: dict[str, list[float]] = {}

    def add(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            if isfinite(value):
                self.history.setdefault(name, []).append(value)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = max(1, min(WIDEST, options.max_width - BESIDE))
        grid = Table.grid(padding=(0, 2, 0, 0))
        for style in ("dim", "", "cyan", "dim"):
            grid.add_column(style=style, no_wrap=True)
        for name, values in self.history.items():
            range_ = f"{min(values):.3g} to {max(values):.3g}"
            grid.add_row(name, f"{values[-1]:.4g}", sparkline(values, width), range_)
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
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.1f} {task.fields['unit']}/s", style="cyan")


@contextmanager
def bar(
    console: Console, what: str, total: int, unit: str, done: int
) -> Iterator[tuple[Callable[[int], None], Callable[[dict[str, float]], None]]]:
    """A bar under the measures, on a terminal; yields what tells it of units done, and of measures."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        RateColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    progress, measures = Progress(*columns), Measures()
    task = progress.add_task(what, total=total, completed=done, unit=unit)
    with Live(Group(measures, progress), console=console):
        yield lambda count: progress.advance(task, count), measures.add
