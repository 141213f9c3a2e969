"""tsdkd plan"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from unittest.mock import patch

import typer

from tsdkd.cli import defaults, objectives, options, train
from tsdkd.cli.console import show_table, show_text
from tsdkd.cli.eval import configured as eval_config
from tsdkd.cli.eval import named
from tsdkd.errors import InputError
from tsdkd.stages.config import GenerateConfig, ScoreConfig

if TYPE_CHECKING:
    from tsdkd.stages.planning.lines import Lines, Row
    from tsdkd.stages.planning.rates import Rates

UsageError: type[Exception] = typer.BadParameter.__bases__[0]
"""Of the parser that typer brings."""
EMBEDDED = {"embedded-teacher": 0, "embedded-student": defaults.STUDENT_DROPS}


def command(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="Lines such as `tsdkd train --lora`; - is the input.")],
) -> None:
    """What a chain of commands will take, before it runs: disk, memory and time. Nothing is run or written."""
    root: Any = context.find_root().command
    parsed = [(number, _parsed(number, line, root)) for number, line in _lines(file)]

    from tsdkd.stages.planning.chain import Chain
    from tsdkd.stages.planning.lines import Lines
    from tsdkd.stages.planning.rates import measure

    rates = measure()
    lines, rows = Lines(Chain(EMBEDDED), rates), []
    for number, line in parsed:
        with _in_line(number):
            rows.append(PLANNED.get(str(line.info_name), _free)(line, lines))
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
            name, _, environment[name] = words.pop(0).partition("=")
        if words[:1] != ["tsdkd"]:
            raise InputError(f"{' '.join(words[:2])} is no tsdkd command.", "Give lines such as `tsdkd train --lora`.")
        command, place = root, words[1:]
        while subcommands := getattr(command, "commands", None):
            name = place.pop(0) if place else ""
            if name not in subcommands:
                raise InputError(f"There is no command {name!r}.", f"Choose from: {', '.join(subcommands)}.")
            command = subcommands[name]
        with patch.dict(os.environ, environment):
            context: typer.Context = command.make_context(name, place)
        return context


@contextmanager
def _in_line(number: int) -> Iterator[None]:
    try:
        yield
    except UsageError as error:
        message = error.format_message()  # type: ignore[attr-defined]
        raise InputError(f"Line {number}: {message}", "See the command's --help.") from None
    except InputError as error:
        raise InputError(f"Line {number}: {error.cause}", error.remedy) from None


def _free(line: typer.Context, lines: Lines) -> Row:
    from tsdkd.stages.planning.lines import Row

    return Row(str(line.info_name), "", None)


def _generate(line: typer.Context, lines: Lines) -> Row:
    given, config = line.params, options.configured(GenerateConfig, line)
    roles = [role for role, others in (("student", "teacher"), ("teacher", "student")) if config.policy != others]
    output = _place(given, "rollouts")
    return lines.generate(_prompts(given, config), _named(given, *roles), output, config, given["overwrite"])


def _score(line: typer.Context, lines: Lines) -> Row:
    given, config = line.params, options.configured(ScoreConfig, line)
    names = _named(given, "student", "teacher")
    return lines.score(_place(given, "rollouts"), names, _place(given, "scores"), config, given["overwrite"])


def _train(line: typer.Context, lines: Lines) -> Row:
    given, config = line.params, train.configured(line)
    names, output = _named(given, "student", "teacher"), _place(given, "checkpoint")
    if config.live:
        rollouts = Path(given["rollouts"]) if given["rollouts"] else None
        prompts = _prompts(given, config.live.sampling)
        return lines.train(rollouts, None, prompts, names, output, config, given["overwrite"])
    told = Path(given["scores"]) if given["scores"] else None
    scores = objectives.scores(config.method, told, Path(given["run"]))
    return lines.train(_place(given, "rollouts"), scores, None, names, output, config, given["overwrite"])


def _eval(line: typer.Context, lines: Lines) -> Row:
    given = line.params
    if given["compare"]:
        return _free(line, lines)
    models = named("--model", list(given["model"] or ()))
    if not models:
        checkpoint = _place(given, "checkpoint")
        roles = lines.chain.roles(checkpoint, "checkpoint")
        models = {
            "teacher": roles["teacher"],
            "student": roles.get("student", str(checkpoint)),
            "distilled": str(checkpoint),
        }
    models |= named("--also", list(given["also"] or ()))
    heldout = Path(given["heldout"]) if given["heldout"] else None
    return lines.evaluate(models, _place(given, "results"), heldout, eval_config(line), given["overwrite"])


def _prune(line: typer.Context, lines: Lines) -> Row:
    lines.prune(line.params["teacher"], Path(line.params["output"]), line.params["drop"])
    return _free(line, lines)


PLANNED: dict[str, Callable[[typer.Context, Lines], Row]] = {
    "generate": _generate,
    "score": _score,
    "train": _train,
    "eval": _eval,
    "prune": _prune,
}


def _place(given: dict[str, Any], kind: str) -> Path:
    return Path(given[kind] or Path(given["run"]) / kind)


def _named(given: dict[str, Any], *roles: str) -> dict[str, str | None]:
    return {role: given[role] for role in roles}


def _prompts(given: dict[str, Any], config: GenerateConfig) -> Any:
    from tsdkd.stages.rollouts.prompts import Prompts

    place = Path(given["prompts"] or defaults.PROMPTS)
    return Prompts(place, config.column, config.limit, config.system, config.config_name, config.split)


def _show(rows: list[Row], rates: Rates) -> None:
    from tsdkd.stages.planning.rates import EFFICIENCY
    from tsdkd.stages.scoring.cost import in_words
    from tsdkd.stages.sizes import free_memory

    disk, memory = shutil.disk_usage(Path.cwd()).free, free_memory(rates.device)
    cells, kept, seconds, peak, most = [], 0, 0.0, 0, 0
    for row in rows:
        found = row.estimate
        if found is None:
            cells.append([row.stage, row.on, row.note, "", "", ""])
            continue
        kept, seconds, most = kept + found.disk, seconds + found.seconds, max(most, kept + found.disk + found.aside)
        peak = max(peak, found.memory)
        size = in_words(found.disk) + (f" + {in_words(found.aside)}" if found.aside else "")
        mark = "≤ " if found.at_most else ""
        cells.append(
            [
                row.stage,
                row.on,
                mark + found.amount,
                _fitting(size, kept + found.aside, disk),
                _fitting(in_words(found.memory), found.memory, memory),
                mark + _time(found.seconds),
            ]
        )
    cells.append(
        ["in all", "", "", _fitting(in_words(most), most, disk), _fitting(in_words(peak), peak, memory), _time(seconds)]
    )
    show_table("plan", ["stage", "on", "work", "disk", "memory", "time"], cells)
    show_text(
        f"Free here: {in_words(disk)} on disk, {in_words(memory)} of memory ({rates.device}). "
        "Disk after + is needed while the stage runs.\n"
        f"Measured now, {rates.dtype}: {rates.flops / 1e9:,.0f} GFLOP/s, {rates.bytes / 1e9:,.1f} GB/s; "
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
