"""The typer app: commands load when they are called; errors become a line of cause and one of remedy."""

import io
import os
import re
import sys
import traceback
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from itertools import zip_longest
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from tsdkd import __version__
from tsdkd.errors import InputError, OtherRankError, TsdkdError
from tsdkd.stages.config.groups import COMMON

INTERRUPTED = 130
UsageError: type[Exception] = typer.BadParameter.__bases__[0]
"""The base of the errors of typer's parser."""
SWITCHED_OFF = "tsdkd.switched_off"
"""Key of a context's meta: the parameters that the command line switches off by --no-NAME."""
MIN_COLUMNS, MAX_COLUMNS = 40, 4096
"""Narrowest and widest terminal, by COLUMNS, that tables fit in."""
STAGES, MORE = "Stages, in order", "More commands"


@dataclass(frozen=True, slots=True)
class CommandEntry:
    """A command of the app; its module is tsdkd.cli.NAME."""

    help: str
    """The first line of the command's docstring."""
    panel: str


COMMANDS = {
    "generate": CommandEntry(
        "Sample responses to prompts from the student, from the teacher, or from both: prompts -> rollouts.", STAGES
    ),
    "score": CommandEntry(
        "Record candidates, ranks, entropies and the teacher signal of each token: rollouts -> scores.", STAGES
    ),
    "train": CommandEntry(
        "Train the student on rollouts and scores, or on prompts with a teacher: rollouts, scores -> checkpoint.",
        STAGES,
    ),
    "eval": CommandEntry(
        "Measure models on the paper's ten or other benchmarks, and compare them: checkpoint or any model -> results.",
        STAGES,
    ),
    "inspect": CommandEntry(
        "Show one response token by token, or all responses together: entropies, ranks and selected tokens.", MORE
    ),
    "report": CommandEntry(
        "Write an HTML page about runs: settings, results, curves, responses, warnings, cost, lineage and commands.",
        MORE,
    ),
    "doctor": CommandEntry(
        "Check a student, a teacher and prompts before a run, or recorded scores: one finding a line, "
        "ok, look or stop.",
        MORE,
    ),
    "plan": CommandEntry("Estimate disk, memory and time of a chain of commands before it runs.", MORE),
    "prune": CommandEntry(
        "Make a student from a teacher by removing layers, for a family without a small model: teacher -> student.",
        MORE,
    ),
    "artifact": CommandEntry("Look at artifacts, and share them: show, verify, lineage, push, pull.", MORE),
}


class Command(TyperCommand):
    """A command that shows --help in the first group of options."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Accept --no-NAME for every switch: a file may have turned it on. Accept --ray without an address."""
        switches = {f"--no-{p.opts[0].lstrip('-')}": p for p in self.params if getattr(p, "is_flag", False)}
        off = {name: p for name, p in switches.items() if name in args and not p.secondary_opts}
        ctx.meta[SWITCHED_OFF] = {p.name for p in off.values()}
        args = [word for word in args if word not in off]
        args = [
            "--ray=auto" if word == "--ray" and (following or "-").startswith("-") else word
            for word, following in zip_longest(args, args[1:])
        ]
        return super().parse_args(ctx, args)

    def get_help_option(self, ctx: Any) -> Any:
        option = super().get_help_option(ctx)
        if option is not None and any(getattr(p, "rich_help_panel", None) == COMMON for p in self.params):
            option.rich_help_panel = COMMON
        return option


class LazyCommand(TyperCommand):
    """A command that is known by name and help; its module is imported when it is called."""

    def __init__(self, name: str, entry: CommandEntry) -> None:
        super().__init__(name, help=entry.help, rich_help_panel=entry.panel, rich_markup_mode="rich")

    def load(self) -> Any:
        """The command itself, or the group of commands."""
        module = import_module(f"tsdkd.cli.{self.name}")
        if hasattr(module, "app"):
            return typer.main.get_group(module.app)
        single = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)
        single.command(self.name, cls=Command, context_settings=app.info.context_settings)(module.command)
        return typer.main.get_command(single)

    def make_context(self, *args: Any, **values: Any) -> Any:
        return self.load().make_context(*args, **values)


class CommandGroup(TyperGroup):
    """The commands of tsdkd; errors become messages, and --debug shows tracebacks."""

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)
        self.commands = {name: LazyCommand(name, entry) for name, entry in COMMANDS.items()}

    def main(self, *args: Any, **settings: Any) -> Any:
        _prepare_streams()
        return super().main(*args, **settings)

    def invoke(self, ctx: Any) -> Any:
        try:
            result = super().invoke(ctx)
            _flush_output()
            return result
        except (typer.Exit, typer.Abort):  # these RuntimeErrors are no failures
            raise
        except UsageError as error:
            if type(error).__name__ == "NoArgsIsHelpError":  # shows the help
                raise
            context = getattr(error, "ctx", None)  # the parser does not know the command of an option without value
            command = context.command_path if context else f"{ctx.command_path} {ctx.invoked_subcommand}"
            _show_error(usage_message(error), f"`{command} --help` lists the options.")
            raise typer.Exit(InputError.exit_code) from None
        except KeyboardInterrupt:
            _show_error(
                "Interrupted; complete parts and the last saved step are kept.",
                "Run the same command again to continue.",
            )
            raise typer.Exit(INTERRUPTED) from None
        except TsdkdError as error:
            if ctx.params.get("debug"):
                raise
            if not isinstance(error, OtherRankError):
                _show_error(_with_option_names(error.cause), error.remedy)
            raise typer.Exit(error.exit_code) from None
        except Exception as error:
            if ctx.params.get("debug") or type(error).__module__.startswith(("typer", "click")):
                raise
            code = _show_failure(error)
            with suppress(OSError):  # what cannot be written is discarded, so that the status is this one
                _flush_output()
            raise typer.Exit(code) from None


def _flush_output() -> None:
    """Write what is still buffered: an error at the interpreter's end would have no message."""
    if sys.stdout is None:  # closed by the caller
        return
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def _prepare_streams() -> None:
    """Make every text printable in the encoding of the terminal, and ignore impossible sizes in COLUMNS and LINES."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    for name, smallest in (("COLUMNS", MIN_COLUMNS), ("LINES", 1)):
        value = os.environ.get(name, "")
        if value.isdecimal() and len(value) < 10 and int(value):
            os.environ[name] = str(min(max(int(value), smallest), MAX_COLUMNS))
        else:
            os.environ.pop(name, None)


def _show_traceback(*error: Any) -> None:
    from tsdkd.cli.console import show_traceback

    show_traceback("".join(traceback.format_exception(*error)))


def _show_failure(error: Exception) -> int:
    """Returns the exit code."""
    from tsdkd.artifacts.disk import disk_failure

    if failure := disk_failure(error):
        _show_error(failure.cause, failure.remedy)
    elif isinstance(error, OSError):
        return _show_system_error(error)
    elif isinstance(error, RuntimeError) and str(error).startswith("Symlink loop"):  # Path.resolve before Python 3.13
        _show_error(f"{error}.", "Correct the link, or name another path.")
    else:
        _show_error(f"{type(error).__name__}: {_first_line(error)}", "Run `tsdkd --debug ...` for the traceback.")
    return 1


def usage_message(error: Exception) -> str:
    """The message of a `UsageError`."""
    return str(error.format_message())  # type: ignore[attr-defined]


def _show_system_error(error: OSError) -> int:
    """Returns the exit code."""
    if error.errno is None:
        _show_error(_first_line(error), "Check the network and the files named; `tsdkd --debug ...` shows a traceback.")
        return 1
    file = f" ({error.filename})" if error.filename else ""
    remedy = "Choose another directory, or correct its permissions, and run again; complete parts are saved."
    _show_error(f"{error.strerror}{file}.", remedy)
    return 1


def _with_option_names(cause: str) -> str:
    """Replace the names of a manifest's settings in the cause of an ArtifactError by the names of options."""
    if "config." not in cause:
        return cause
    from tsdkd.stages.config.option import config_options
    from tsdkd.stages.config.recorded import CONFIGS

    names = {option.key: f"--{option.name}" for kind in CONFIGS.values() for option in config_options(kind)}
    names |= {"online": "online training", "objective": "the objective"}
    return re.sub(r"\bconfig\.([a-z_.]*[a-z_])(?= was )", lambda match: names.get(match[1], match[1]), cause)


def _show_error(cause: str, remedy: str) -> None:
    from tsdkd.cli.console import show_error

    show_error(cause, remedy)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or "no reason given").splitlines()[0]


app = typer.Typer(
    name="tsdkd",
    cls=CommandGroup,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tsdkd {__version__}")
        raise typer.Exit


@app.callback()
def root(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Distil a large language model's reasoning into a small one, on the tokens that matter (TSD-KD).

    generate -> score -> train -> eval: each stage reads artifacts and writes one, in the directory of a --run.
    """
    if debug:
        sys.excepthook = _show_traceback
