"""The screen: values, tables, errors, and the progress that stages report.

A terminal shows progress bars; a log gets one line a minute. Errors go to stderr: cause, then remedy. A path stays on
one line, however long, so that it can be copied.
"""

import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.box import SIMPLE
from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table
from rich.text import Text
from rich.tree import Tree

from tsdkd.processes import rank

IS_RANK_0 = rank() == 0
"""Only rank 0 of a distributed run (torchrun, accelerate launch) prints; every rank shows errors."""
UNLIMITED = 4096
"""Columns of output that is read by a program or kept in a file."""
out = Console(
    width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else UNLIMITED,
    highlight=False,
    emoji=False,
    quiet=not IS_RANK_0,
)
err = Console(stderr=True, highlight=False, emoji=False)


class ConsoleObserver:
    """Shows the reports of stages on the terminal (see `tsdkd.stages.observer.Observer`)."""

    def __init__(self, *, plain: bool = False) -> None:
        """`plain`: lines for a log, even on a terminal."""
        self.plain = plain
        self._warnings: list[str] = []
        self._show_metrics: Callable[[dict[str, float]], None] = lambda _: None

    @contextmanager
    def progress(self, label: str, total: int, unit: str, done: int = 0) -> Iterator[Callable[[int], None]]:
        if not IS_RANK_0:
            yield lambda _: None
            return
        from tsdkd.cli import progress

        if self.plain or not err.is_terminal:
            lines = progress.ProgressLines(err, label, total, unit, done)
            self._show_metrics = lines.metrics
            yield lines.advance
        else:
            with progress.progress_bar(err, label, total, unit, done) as (advance, self._show_metrics):
                yield advance

    def metrics(self, values: dict[str, float]) -> None:
        self._show_metrics(values)

    def info(self, message: str) -> None:
        if IS_RANK_0:
            err.print(escape(message), soft_wrap=True)

    def warning(self, message: str) -> None:
        self._warnings.append(message)
        if IS_RANK_0:
            err.print(escape(message), style="yellow", soft_wrap=True)

    @contextmanager
    def writing(self, artifact: Path) -> Iterator[None]:
        """Write config.yaml and the journal beside an artifact that is not complete yet."""
        from tsdkd.artifacts.journal import record_session
        from tsdkd.artifacts.manifest import load_manifest
        from tsdkd.stages.config.recorded import write_config

        if not IS_RANK_0:  # rank 0 may not have written the manifest yet
            yield
            return
        manifest = load_manifest(artifact)
        if manifest.state == "complete":
            yield
            return
        write_config(artifact, manifest)
        with record_session(artifact, command_line(), self._warnings):
            yield

    def table(self, title: str, rows: list[tuple[str, str]]) -> None:
        show_pairs(title, rows)


def command_line() -> str:
    """The command of this process, with TSDKD_RUN in front if it names the run."""
    run = os.environ.get("TSDKD_RUN")
    is_named = any(word.split("=")[0] == "--run" for word in sys.argv)
    variable = f"TSDKD_RUN={shlex.quote(run)} " if run and not is_named else ""
    return variable + shlex.join(["tsdkd", *sys.argv[1:]])


def show_pairs(title: str, rows: Sequence[tuple[str, str]]) -> None:
    """A title, then a line for each name and value; further lines of a value are indented."""
    width = max((cell_len(name) for name, _ in rows), default=0)
    out.print(Text(title, "bold"), soft_wrap=True)
    for name, value in rows:
        margin = " " * (width - cell_len(name))
        line = value.replace("\n", "\n" + " " * (width + 4))
        out.print(Text.assemble("  ", (name, "dim"), margin, "  ", line), soft_wrap=True)


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(*(Column(name, overflow="fold") for name in columns), box=SIMPLE, padding=(0, 1, 0, 0))
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    out.print(escape(title))
    out.print(table)


def show_text(text: str) -> None:
    """Plain text without wrapping, to paste or to pipe."""
    out.print(text, markup=False, soft_wrap=True)


def show_tree(tree: Tree) -> None:
    """A tree with one line for each entry, however long, so that paths can be copied."""
    Console(width=UNLIMITED, highlight=False, emoji=False, quiet=not IS_RANK_0).print(tree)


def show_next(command: str) -> None:
    out.print(f"next: [bold]{escape(command)}[/bold]", soft_wrap=True)


def show_error(cause: str, remedy: str) -> None:
    err.print(f"[red]error:[/red] {escape(cause)}", soft_wrap=True)
    err.print(f"[green]try:[/green]   {escape(remedy)}", soft_wrap=True)
