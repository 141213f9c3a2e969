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

import typer

from tsdkd.artifacts.regular_files import MAX_TEXT, require_regular_file
from tsdkd.cli import defaults
from tsdkd.cli.app import UsageError, usage_message
from tsdkd.cli.console import show_table, show_text
from tsdkd.cli.plan_commands import plan_command
from tsdkd.errors import InputError

if TYPE_CHECKING:
    from tsdkd.stages.plan.estimates import Estimate
    from tsdkd.stages.plan.rates import Rates
    from tsdkd.stages.plan.stage import PlanRow

EMBEDDED = {defaults.EMBEDDED_TEACHER: 0, defaults.EMBEDDED_STUDENT: defaults.STUDENT_DROPS}


def command(
    context: typer.Context,
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="File with lines such as `tsdkd train --lora`; -: standard input."),
    ],
    prompts: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Prompts that a dataset on the hub has.", show_default="its --limit"),
    ] = None,
) -> None:
    """Estimate disk, memory and time of a chain of commands before it runs.

    No command of the file runs, and nothing is written.
    """
    root: Any = context.find_root().command
    parsed = [(number, _parse(number, line, root)) for number, line in _read_lines(file)]

    from tsdkd.stages.plan.chain import Chain
    from tsdkd.stages.plan.rates import measure_rates
    from tsdkd.stages.plan.stage import Planner

    rates = measure_rates()
    planner, rows = Planner(Chain(EMBEDDED, prompts), rates), []
    for number, line in parsed:
        with _errors_name_line(number):
            rows.append(plan_command(line, planner))
    _show(rows, rates)


def _read_lines(file: Path) -> Iterator[tuple[int, str]]:
    """Number and text of each line that is neither empty nor a comment."""
    if str(file) == "-":
        content = sys.stdin.buffer.read()
    else:
        require_regular_file(file, "plan", MAX_TEXT)
        content = file.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise InputError(f"{file}, line {line}: not UTF-8.", "Save the file as UTF-8.") from None
    return (
        (n, line) for n, line in enumerate(text.splitlines(), 1) if line.strip() and not line.lstrip().startswith("#")
    )


def _parse(number: int, line: str, root: Any) -> typer.Context:
    """A line, parsed by the command that it calls. Raises InputError for a line that the command would refuse."""
    with _errors_name_line(number):
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            raise InputError(f"{error}.", "Close the quotes.") from None
        variables = {}
        while words and "=" in words[0]:
            variable, _, value = words.pop(0).partition("=")
            variables[variable] = value
        if words[:1] != ["tsdkd"]:
            raise InputError(
                f"{' '.join(words[:2])} is not a tsdkd command.", "Give lines such as `tsdkd train --lora`."
            )
        command, names, arguments = root, list[str](), words[1:]
        while subcommands := getattr(command, "commands", None):
            names.append(arguments.pop(0) if arguments else "")
            if names[-1] not in subcommands:
                raise InputError(f"{names[-1]!r} is not a command.", f"Choose from: {', '.join(subcommands)}.")
            command = subcommands[names[-1]]
            command = command.load() if hasattr(command, "load") else command
        name = " ".join(names)
        try:
            with _environment(variables):
                context: typer.Context = command.make_context(name, arguments)
        except UsageError as error:
            raise InputError(usage_message(error), f"`tsdkd {name} --help` lists the options.") from None
        return context


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Set variables, and restore them afterwards."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _errors_name_line(number: int) -> Iterator[None]:
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

    def cells(name: str, models: str, estimate: Estimate, disk_before: int = 0) -> list[str]:
        size = format_bytes(estimate.disk) + (
            f"\n+ {format_bytes(estimate.temporary_disk)}" if estimate.temporary_disk else ""
        )
        disk_ = _mark_unfit(size, disk_before + estimate.disk + estimate.temporary_disk, disk)
        memory_ = _mark_unfit(format_bytes(estimate.memory), estimate.memory, memory)
        time = ("≤ " if estimate.is_upper_bound else "") + format_time(estimate.seconds)
        return [name, models, estimate.work, disk_, memory_, time]

    lines, written = [], 0
    for row in rows:
        estimate = row.estimate
        lines.append(
            cells(row.stage, row.inputs, estimate, written)
            if estimate
            else [row.stage, row.inputs, row.note, "", "", ""]
        )
        written += estimate.disk if estimate else 0
    lines.append(cells("total", "", sum_estimates([row.estimate for row in rows if row.estimate])))
    show_table("plan", ["stage", "models", "work", "disk", "memory", "time"], lines)
    show_text(
        f"Free on this machine: {format_bytes(disk)} on disk, {format_bytes(memory)} of memory ({rates.device}). "
        "Disk after + is needed while the stage runs.\n"
        f"Measured now, {rates.dtype}: {rates.flops_per_second / 1e9:,.0f} GFLOP/s, "
        f"{rates.bytes_per_second / 1e9:,.1f} GB/s; "
        f"the times assume {EFFICIENCY:.0%} of them, in one process.\n"
        "≤: upper bound, with every response as long as --max-new-tokens."
    )


def _mark_unfit(text: str, needed: int, available: int) -> str:
    return text if needed <= available else f"{text}: does not fit"


def format_time(seconds: float) -> str:
    """A duration in a readable unit."""
    for unit, size in (("days", 172_800), ("h", 5_400), ("min", 90)):
        if seconds >= size:
            return f"{seconds / {'days': 86_400, 'h': 3_600, 'min': 60}[unit]:,.1f} {unit}"
    return f"{seconds:,.0f} s"
