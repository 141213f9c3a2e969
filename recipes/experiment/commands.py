"""Runs `tsdkd` commands in this process: loading torch in a new process takes longer than a small arm."""

import contextlib
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

from tsdkd.cli import app
from tsdkd.errors import InputError

INTERRUPTED = 130
CONTINUE = "interrupted: run the same command again to continue"


@contextlib.contextmanager
def exit_statuses() -> Iterator[None]:
    """Exit with 2 and the remedy after an InputError, and with `INTERRUPTED` after Ctrl-C."""
    try:
        yield
    except InputError as error:
        sys.stderr.write(f"error: {error.cause}\ntry:   {error.remedy}\n")
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        sys.stdout.write(f"{CONTINUE}\n")
        raise SystemExit(INTERRUPTED) from None


def run_tsdkd(directory: Path, command: str) -> None:
    """Run one command and append its output to `directory/log.txt`. If it fails, print why and raise SystemExit."""
    directory.mkdir(parents=True, exist_ok=True)
    log = directory / "log.txt"
    sys.argv = ["tsdkd", *shlex.split(command)]  # the journal records the command
    with log.open("a") as output, contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        status = app(sys.argv[1:], prog_name="tsdkd", standalone_mode=False)
    if status:
        reason = CONTINUE if status == INTERRUPTED else f"failed; see {log.resolve()}"
        sys.stdout.write(f"tsdkd {command}: {reason}\n")
        raise SystemExit(status)
