"""Runs `tsdkd` commands in this process: loading torch in a new process takes longer than a small arm."""

import contextlib
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

from tsdkd.cli import app
from tsdkd.errors import NotFiniteError, TsdkdError

INTERRUPTED = 130
CONTINUE = "interrupted: run the same command again to continue"


@contextlib.contextmanager
def exit_statuses() -> Iterator[None]:
    """Print cause and remedy of a TsdkdError and exit with its code; after Ctrl-C with `INTERRUPTED`."""
    try:
        yield
    except TsdkdError as error:
        sys.stderr.write(f"error: {error.cause}\ntry:   {error.remedy}\n")
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        sys.stdout.write(f"{CONTINUE}\n")
        raise SystemExit(INTERRUPTED) from None


def run_tsdkd(directory: Path, command: str) -> None:
    """Run one command and append its output to `directory/log.txt`.

    Raises NotFiniteError where the command does. After another failure, prints why and raises SystemExit.
    """
    directory.mkdir(parents=True, exist_ok=True)
    log = directory / "log.txt"
    sys.argv = ["tsdkd", *shlex.split(command)]  # the journal records the command
    with log.open("a") as output, contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        status = app(sys.argv[1:], prog_name="tsdkd", standalone_mode=False)
    if status == NotFiniteError.exit_code:
        raise NotFiniteError(f"`tsdkd {command}` found values that are not finite.", f"Read {log.resolve()}.")
    if status:
        reason = CONTINUE if status == INTERRUPTED else f"failed; see {log.resolve()}"
        sys.stdout.write(f"tsdkd {command}: {reason}\n")
        raise SystemExit(status)
