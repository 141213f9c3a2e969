"""The typer app, and what an error becomes: one line of cause, one of remedy, an exit code."""

import errno
import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from tsdkd import __version__
from tsdkd.cli.console import out, show_error
from tsdkd.errors import OtherRankError, TsdkdError

INTERRUPTED = 130
NEEDS_ROOM = {errno.ENOSPC, errno.EDQUOT}


class Guarded(TyperGroup):
    """Turns errors into messages; a traceback only with --debug."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort):  # RuntimeErrors, but no errors
            raise
        except KeyboardInterrupt:
            show_error("Interrupted; what was finished is kept.", "Run the same command again to continue.")
            raise typer.Exit(INTERRUPTED) from None
        except TsdkdError as error:
            if ctx.params.get("debug"):
                raise
            _tell(error)
            raise typer.Exit(error.exit_code) from None
        except OSError as error:
            if ctx.params.get("debug"):
                raise
            raise typer.Exit(_tell_of_system(error)) from None
        except Exception as error:
            if ctx.params.get("debug") or type(error).__module__.startswith(("typer", "click")):
                raise
            show_error(f"{type(error).__name__}: {_first_line(error)}", "Run `tsdkd --debug ...` to see where.")
            raise typer.Exit(1) from None


def _tell(error: TsdkdError) -> None:
    if not isinstance(error, OtherRankError):
        show_error(error.cause, error.remedy)


def _tell_of_system(error: OSError) -> int:
    """Returns the exit code."""
    if isinstance(error, BrokenPipeError):  # who reads our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if error.errno is None:
        show_error(_first_line(error), "Check the network and the files named; `tsdkd --debug ...` shows where.")
        return 1
    place = f" ({error.filename})" if error.filename else ""
    remedy = "Free space" if error.errno in NEEDS_ROOM else "Choose another directory, or mend its permissions"
    show_error(f"{error.strerror}{place}.", f"{remedy}, and run again; what was finished is kept.")
    return 1


def _first_line(error: Exception) -> str:
    return (str(error).strip() or "no reason given").splitlines()[0]


app = typer.Typer(
    cls=Guarded,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        out.print(f"tsdkd {__version__}")
        raise typer.Exit


@app.callback()
def root(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Distil a large language model's reasoning into a small one, on the tokens that matter (TSD-KD).

    generate -> score -> train -> eval: each stage reads artifacts and writes one, under one --run directory.
    """
