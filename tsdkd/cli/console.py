"""What a user sees: panels, tables, errors, and what a stage reports (drawn by live.py).

On a terminal, stages draw bars; piped, they say only what matters, and once a minute how far they are. Errors go to
stderr: cause, then remedy.
"""

import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Column, Table
from rich.text import Text
from rich.tree import Tree

from tsdkd.cli.progress import ProgressLines, progress_bar
from tsdkd.ranks import rank

FIRST = rank() == 0
"""Of several processes (torchrun, accelerate launch) only the first speaks; all may fail."""
out = Console(highlight=False, emoji=False, quiet=not FIRST)
err = Console(stderr=True, highlight=False, emoji=False)


class ConsoleObserver:
    """Shows what stages report (see `tsdkd.stages.observer.Observer`)."""

    def __init__(self, *, plain: bool = False) -> None:
        """`plain`: lines for a log, even on a terminal."""
        self.plain = plain
        self._warnings: list[str] = []
        self._show_measures: Callable[[dict[str, float]], None] = lambda _: None

    @contextmanager
    def progress(self, what: str, total: int, unit: str, done: int = 0) -> Iterator[Callable[[int], None]]:
        if not FIRST:
            yield lambda _: None
        elif self.plain or not err.is_terminal:
            lines = ProgressLines(err, what, total, unit, done)
            self._show_measures = lines.measures
            yield lines.advance
        else:
            with progress_bar(err, what, total, unit, done) as (advance, self._show_measures):
                yield advance

    def metrics(self, values: dict[str, float]) -> None:
        self._show_measures(values)

    def info(self, message: str) -> None:
        if FIRST:
            err.print(escape(message), soft_wrap=True)

    def warning(self, message: str) -> None:
        self._warnings.append(message)
        if FIRST:
            err.print(escape(message), style="yellow", soft_wrap=True)

    @contextmanager
    def writing(self, artifact: Path) -> Iterator[None]:
        """What it takes is noted in the artifact's journal; a finished artifact takes nothing."""
        from tsdkd.artifacts.journal import record_session
        from tsdkd.artifacts.manifest import load_manifest

        if not FIRST or load_manifest(artifact).state == "complete":
            yield
            return
        with record_session(artifact, _typed(), self._warnings):
            yield

    def table(self, title: str, rows: list[tuple[str, str]]) -> None:
        show_pairs(title, rows)


def _typed() -> str:
    """This process's command, with the run where the environment names it."""
    run = os.environ.get("TSDKD_RUN")
    named = (
        f"TSDKD_RUN={shlex.quote(run)} " if run and not any(word.split("=")[0] == "--run" for word in sys.argv) else ""
    )
    return named + shlex.join(["tsdkd", *sys.argv[1:]])


def show_pairs(title: str, rows: Sequence[tuple[str, str]]) -> None:
    """Names and values in a panel."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(overflow="fold")
    grid.add_column(overflow="fold")
    for name, value in rows:
        grid.add_row(f"[dim]{escape(name)}[/dim]", escape(value))
    out.print(Panel(grid, title=Text(title), title_align="left", expand=False))


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(*(Column(name, overflow="fold") for name in columns), box=SIMPLE, padding=(0, 1, 0, 0))
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    out.print(escape(title))
    out.print(table)


def show_text(text: str) -> None:
    """As it is, to paste or to pipe."""
    out.print(text, markup=False, soft_wrap=True)


def show_tree(tree: Tree) -> None:
    """Each entry on one line, however long: a path that is cut in two cannot be copied."""
    Console(width=4096, highlight=False, emoji=False, quiet=not FIRST).print(tree)


def show_next(command: str) -> None:
    out.print(f"next: [bold]{escape(command)}[/bold]", soft_wrap=True)


def show_error(cause: str, remedy: str) -> None:
    err.print(f"[red]error:[/red] {escape(cause)}", soft_wrap=True)
    err.print(f"[green]try:[/green]   {escape(remedy)}", soft_wrap=True)
