"""What a user sees: progress bars, panels, tables and errors. The only module that knows rich.

On a terminal, stages draw bars; piped, they say only what matters, and once a minute how far they are. Errors go to
stderr: cause, then remedy.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.box import SIMPLE
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
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
from rich.tree import Tree

FIRST = os.environ.get("RANK", "0") == "0"
"""Of several processes (torchrun, accelerate launch) only the first speaks; all may fail."""
out = Console(highlight=False, quiet=not FIRST)
err = Console(stderr=True, highlight=False)


class RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.1f} {task.fields['unit']}/s", style="cyan")


class Lines:
    """Progress for a log: a line a minute."""

    EVERY = 60.0

    def __init__(self, what: str, total: int, unit: str, done: int) -> None:
        self.what, self.total, self.unit, self.done = what, total, unit, done
        self.before = done
        self.measures: dict[str, float] = {}
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
        measures = "".join(f", {name} {value:.4g}" for name, value in self.measures.items())
        err.print(escape(line + measures), soft_wrap=True)


class Reporter:
    """Shows what stages report (see `tsdkd.stages.reporter.Reporter`)."""

    def __init__(self) -> None:
        self._show_measures: Callable[[dict[str, float]], None] = lambda _: None

    @contextmanager
    def progress(self, what: str, total: int, unit: str, done: int = 0) -> Iterator[Callable[[int], None]]:
        if not FIRST:
            yield lambda _: None
            return
        if not err.is_terminal:
            lines = Lines(what, total, unit, done)
            self._show_measures = lines.measures.update
            yield lines.advance
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            RateColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        bar = Progress(*columns)
        task = bar.add_task(what, total=total, completed=done, unit=unit)
        with Live(bar, console=err) as live:
            self._show_measures = lambda values: live.update(Group(_grid(values), bar))
            yield lambda count: bar.advance(task, count)

    def measures(self, values: dict[str, float]) -> None:
        self._show_measures(values)

    def say(self, message: str) -> None:
        if FIRST:
            err.print(escape(message), style="yellow", soft_wrap=True)

    def table(self, title: str, rows: list[tuple[str, str]]) -> None:
        show_pairs(title, rows)


def _grid(values: dict[str, float]) -> Table:
    """Names over values, in as many columns as there are."""
    grid = Table.grid(*values, padding=(0, 2))
    grid.add_row(*(f"[dim]{name.replace('_', ' ')}[/dim]" for name in values))
    grid.add_row(*(f"{value:.4g}" for value in values.values()))
    return grid


def show_pairs(title: str, rows: Sequence[tuple[str, str]]) -> None:
    """Names and values in a panel."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(overflow="fold")
    grid.add_column(overflow="fold")
    for name, value in rows:
        grid.add_row(f"[dim]{escape(name)}[/dim]", escape(value))
    out.print(Panel(grid, title=escape(title), title_align="left", expand=False))


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(*columns, box=SIMPLE, padding=(0, 1, 0, 0))
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    out.print(escape(title))
    out.print(table)


def show_text(text: str) -> None:
    """As it is, to paste or to pipe."""
    out.print(text, markup=False, soft_wrap=True)


def show_tree(tree: Tree) -> None:
    """Each entry on one line, however long: a path that is cut in two cannot be copied."""
    Console(width=4096, highlight=False, quiet=not FIRST).print(tree)


def show_next(command: str) -> None:
    out.print(f"next: [bold]{escape(command)}[/bold]", soft_wrap=True)


def show_error(cause: str, remedy: str) -> None:
    err.print(f"[red]error:[/red] {escape(cause)}", soft_wrap=True)
    err.print(f"[green]try:[/green]   {escape(remedy)}", soft_wrap=True)
