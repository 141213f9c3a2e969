"""tsdkd plan"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from unittest.mock import patch

import typer

from tsdkd.cli import defaults
from tsdkd.cli.console import show_table, show_text
from tsdkd.cli.plan_commands import plan_command
from tsdkd.errors import InputError

if TYPE_CHECKING:
    from tsdkd.stages.plan.estimates import Estimate
    from tsdkd.stages.plan.rates import Rates
    from tsdkd.stages.plan.stage import PlanRow

UsageError: type[Exception] = typer.BadParameter.__bases__[0]
"""Of the parser that typer brings."""
EMBEDDED = {defaults.EMBEDDED_TEACHER: 0, defaults.EMBEDDED_STUDENT: defaults.STUDENT_DROPS}


def command(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="Lines such as `tsdkd train --lora`; - is the input.")],
    prompts: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="How many a dataset of the hub has.", show_default="its --limit"),
    ] = None,
) -> None:
    """What a chain of commands will take, before it runs: disk, memory and time. Nothing is run or written."""
    root: Any = context.find_root().command
    parsed = [(number, _parsed(number, line, root)) for number, line in _lines(file)]

    from tsdkd.stages.plan.chain import Chain
    from tsdkd.stages.plan.rates import measure_rates
    from tsdkd.stages.plan.stage import Planner

    rates = measure_rates()
    lines, rows = Planner(Chain(EMBEDDED, prompts), rates), []
    for number, line in parsed:
        with _in_line(number):
            rows.append(plan_command(line, lines))
    _show(rows, rates)


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Numbers and texts, without empty ones and comments."""
    if str(file) != "-" and not file.is_file():
        raise InputError(f"There is no file {file}.", "Name one with a command a line, or - for the input.")
    text = sys.stdin.read() if str(file) == "-" else file.read_text()
    return (
        (n, line) for n, line in enumerate(text.splitlines(), 1) if line.strip() and not line.lstrip().startswith("#")
    )


def _parsed(number: int, line: str, root: Any) -> typer.Context:
    """A line as the command it names understands it. Raises InputError for what that would not take."""
    with _in_line(number):
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            raise InputError(f"{error}.", "Close the quotes.") from None
        environment = {}
        while words and "=" in words[0]:
            variable, _, value = words.pop(0).partition("=")
            environment[variable] = value
        if words[:1] != ["tsdkd"]:
            raise InputError(f"{' '.join(words[:2])} is no tsdkd command.", "Give lines such as `tsdkd train --lora`.")
        command, named, place = root, list[str](), words[1:]
        while subcommands := getattr(command, "commands", None):
            named.append(place.pop(0) if place else "")
            if named[-1] not in subcommands:
                raise InputError(f"There is no command {named[-1]!r}.", f"Choose from: {', '.join(subcommands)}.")
            command = subcommands[named[-1]]
        name = " ".join(named)
        try:
            with patch.dict(os.environ, environment):
                context: typer.Context = command.make_context(name, place)
        except UsageError as error:
            message = error.format_message()  # type: ignore[attr-defined]
            raise InputError(message, f"`tsdkd {name} --help` lists the options.") from None
        return context


@contextmanager
def _in_line(number: int) -> Iterator[None]:
    try:
        yield
    except InputError as error:
        raise InputError(f"Line {number}: {error.cause}", error.remedy) from None


def _show(rows: list[PlanRow], rates: Rates) -> None:
    from tsdkd.stages.data.score_cost import format_bytes
    from tsdkd.stages.models.device import available_memory
    from tsdkd.stages.plan.estimates import sum_estimates
    from tsdkd.stages.plan.rates import EFFICIENCY

    disk, memory = shutil.disk_usage(Path.cwd()).free, available_memory(rates.device)

    def cells(name: str, on: str, found: Estimate, before: int = 0) -> list[str]:
        size = format_bytes(found.disk) + (f"\n+ {format_bytes(found.temporary_disk)}" if found.temporary_disk else "")
        disk_ = _fitting(size, before + found.disk + found.temporary_disk, disk)
        memory_ = _fitting(format_bytes(found.memory), found.memory, memory)
        return [name, on, found.work, disk_, memory_, ("≤ " if found.is_upper_bound else "") + _time(found.seconds)]

    lines, kept = [], 0
    for row in rows:
        found = row.estimate
        lines.append(
            cells(row.stage, row.inputs, found, kept) if found else [row.stage, row.inputs, row.note, "", "", ""]
        )
        kept += found.disk if found else 0
    lines.append(cells("in all", "", sum_estimates([row.estimate for row in rows if row.estimate])))
    show_table("plan", ["stage", "on", "work", "disk", "memory", "time"], lines)
    show_text(
        f"Free here: {format_bytes(disk)} on disk, {format_bytes(memory)} of memory ({rates.device}). "
        "Disk after + is needed while the stage runs.\n"
        f"Measured now, {rates.dtype}: {rates.flops_per_second / 1e9:,.0f} GFLOP/s, "
        f"{rates.bytes_per_second / 1e9:,.1f} GB/s; "
        f"{EFFICIENCY:.0%} of them is reckoned with, in one process.\n"
        "≤: as if every response were as long as --max-new-tokens lets it be."
    )


def _fitting(text: str, needed: int, there: int) -> str:
    return text if needed <= there else f"{text}: does not fit"


def _time(seconds: float) -> str:
    for unit, size in (("days", 172_800), ("h", 5_400), ("min", 90)):
        if seconds >= size:
            return f"{seconds / {'days': 86_400, 'h': 3_600, 'min': 60}[unit]:,.1f} {unit}"
    return f"{seconds:,.0f} s"
