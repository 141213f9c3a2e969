"""Runs every stage on tiny models of many architectures and compares each with plain transformers and peft.

    python benchmarks/architectures.py [--only NAME ...] [--markdown docs/architectures.md]

The reference reads one sequence at a time in float32, without padding, cache or tsdkd. A cell of the table is "ok", or
"refused" with tsdkd's reason, or "FAILED". The exit status is 1 if a cell is FAILED.
"""

import argparse
import sys
import time
import traceback
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.architecture_checks import CHECKS
from benchmarks.architecture_models import ARCHITECTURES
from benchmarks.architecture_page import page
from benchmarks.architecture_workspace import MismatchError, Workspace
from tsdkd.errors import TsdkdError, first_line

DIFFERS, NOT_RUN = "FAILED (differs)", "not run"


def run_checks(architecture: str, tracebacks: list[str]) -> dict[str, str]:
    """The cells of one row: "ok", "refused: reason", "FAILED: error", or "not run" after a refusal."""
    cells: dict[str, str] = {}
    with TemporaryDirectory() as directory:
        workspace = Workspace(Path(directory), architecture)
        for column, (check, needed) in CHECKS.items():
            if needed and not cells[needed].startswith(("ok", DIFFERS)):
                cells[column] = NOT_RUN
                continue
            try:
                check(workspace)
                cell = "ok"
            except TsdkdError as error:
                cell = f"refused: {error.cause}"
            except Exception as error:
                word = DIFFERS if isinstance(error, MismatchError) else "FAILED"
                cell = f"{word}: {type(error).__name__}: {first_line(error)}"
                tracebacks.append(f"## {architecture}, {column}\n\n```\n{traceback.format_exc()}```\n")
            cells[column] = cell.replace(f"{directory}/", "")
    return cells


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES), metavar="NAME")
    parser.add_argument("--markdown", type=Path, help="page to write")
    parser.add_argument("--tracebacks", type=Path, help="file for the tracebacks of FAILED cells")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows, tracebacks = {}, []
    for name in options.only:
        started = time.monotonic()
        rows[name] = run_checks(name, tracebacks)
        print(f"{name} ({time.monotonic() - started:.0f} s)")
        for column, cell in rows[name].items():
            if cell != "ok":
                print(f"    {column}: {cell}", flush=True)
        if options.tracebacks:
            options.tracebacks.write_text("\n".join(tracebacks))
    if options.markdown:
        options.markdown.write_text(page(rows, {column: str(check.__doc__) for column, (check, _) in CHECKS.items()}))
    sys.exit(bool(tracebacks))


if __name__ == "__main__":
    main()
