"""`tsdkd` commands in this process: a new process would load torch for longer than a small arm takes."""

import contextlib
import shlex
import sys
from pathlib import Path

from tsdkd.cli import app

INTERRUPTED = 130


def run_tsdkd(directory: Path, command: str) -> None:
    """Run one command with its output in `directory/log.txt`. Raises SystemExit when it fails, which prints why."""
    directory.mkdir(parents=True, exist_ok=True)
    log = directory / "log.txt"
    sys.argv = ["tsdkd", *shlex.split(command)]  # the journal records the command
    with log.open("a") as output, contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        status = app(sys.argv[1:], prog_name="tsdkd", standalone_mode=False)
    if status:
        interrupted = status == INTERRUPTED
        reason = (
            "interrupted: run the same command again to continue" if interrupted else f"failed; see {log.resolve()}"
        )
        sys.stdout.write(f"tsdkd {command}: {reason}\n")
        raise SystemExit(status)
