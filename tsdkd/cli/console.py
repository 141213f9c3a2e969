"""The screen: values, tables, errors, and the progress that stages report.

A terminal shows progress bars; a log gets one line a minute. Errors go to stderr: cause, then remedy. A path stays on
one line, however long, so that it can be copied. Both consoles escape what they print (`SafeConsole`).
"""

import os
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Column, Table
from rich.text import Text
from rich.tree import Tree

from tsdkd.printable import escape_controls
from tsdkd.processes import rank

IS_RANK_0 = rank() == 0
"""Only rank 0 of a distributed run (torchrun, accelerate launch) prints; every rank shows errors."""
UNLIMITED = 4096
"""Columns of output that is read by a program or kept in a file."""


class SafeConsole(Console):
    """A console without markup that escapes its text: names and responses are untrusted."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(highlight=False, emoji=False, markup=False, **settings)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Only segments of rich's own controls, such as the cursor's moves, reach the terminal unescaped."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else escape_controls(text), style, control)

    def on_broken_pipe(self) -> None:
        """The reader has closed the output, as `head` does; the command continues without it."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


out = SafeConsole(
    width=None if (sys.stdout and sys.stdout.isatty()) or "COLUMNS" in os.environ else UNLIMITED,
    quiet=not IS_RANK_0,
)
err = SafeConsole(stderr=True)


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
            err.print(escape_controls(message, one_line=True), soft_wrap=True)

    def warning(self, message: str) -> None:
        self._warnings.append(message)
        if IS_RANK_0:
            err.print(escape_controls(message, one_line=True), style="yellow", soft_wrap=True)

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
    rows = [(escape_controls(name, one_line=True), escape_controls(value)) for name, value in rows]
    width = max((cell_len(name) for name, _ in rows), default=0)
    out.print(Text(escape_controls(title, one_line=True), "bold"), soft_wrap=True)
    for name, value in rows:
        margin = " " * (width - cell_len(name))
        line = value.replace("\n", "\n" + " " * (width + 4))
        out.print(Text.assemble("  ", (name, "dim"), margin, "  ", line), soft_wrap=True)


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Cells fold; they are escaped here, because a column's width counts the characters that are shown."""
    table = Table(
        *(Column(escape_controls(name), overflow="fold") for name in columns), box=SIMPLE, padding=(0, 1, 0, 0)
    )
    for row in rows:
        table.add_row(*map(escape_controls, row))
    out.print(title)
    out.print(table)


def show_text(text: str) -> None:
    """Plain text without wrapping, to paste or to pipe."""
    out.print(text, soft_wrap=True)


def show_tree(tree: Tree) -> None:
    """A tree with one line for each entry, however long, so that paths can be copied."""
    SafeConsole(width=UNLIMITED, quiet=not IS_RANK_0).print(tree)


def show_next(command: str) -> None:
    out.print(Text.assemble("next: ", (escape_controls(command, one_line=True), "bold")), soft_wrap=True)


def show_traceback(text: str) -> None:
    err.print(text, end="", soft_wrap=True)


def show_error(cause: str, remedy: str) -> None:
    for label, style, text in (("error: ", "red", cause), ("try:   ", "green", remedy)):
        err.print(Text.assemble((label, style), escape_controls(text, one_line=True)), soft_wrap=True)
