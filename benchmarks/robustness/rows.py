"""Options, rows and the table of the campaigns in this directory.

A campaign is a module with `--trials N --seed S --json FILE`. It prints its table, writes its rows to FILE as a JSON
list of {"name", "trials", "faults", "counts"}, and exits with 1 if there is a fault.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, slots=True)
class Row:
    """The counts of one kind of trial."""

    name: str
    trials: int
    faults: int
    counts: dict[str, int] = field(default_factory=dict)
    """Further counts by name."""


def campaign_parser(description: str | None, trials: int) -> argparse.ArgumentParser:
    """The options of every campaign; `trials`: the default of --trials."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=trials, help="number of trials")
    parser.add_argument("--seed", type=int, default=0, help="seed that chooses the trials")
    parser.add_argument("--json", type=Path, help="file that the rows are written to")
    return parser


def show_rows(title: str, rows: Sequence[Row]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row.counts))
    table = Table("", "trials", "faults", *names, title=title)
    total = Row("all", sum(row.trials for row in rows), sum(row.faults for row in rows))
    total.counts.update({name: sum(row.counts.get(name, 0) for row in rows) for name in names})
    for row in (*rows, total):
        table.add_row(row.name, *(f"{n:,}" for n in (row.trials, row.faults, *(row.counts.get(n, 0) for n in names))))
    Console(width=160, highlight=False).print(table)


def write_rows_and_exit(title: str, rows: Sequence[Row], file: Path | None) -> None:
    """Print the table, write the rows, and exit with 1 if one has a fault."""
    show_rows(title, rows)
    if file:
        file.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    raise SystemExit(any(row.faults for row in rows))


def read_rows(file: Path) -> list[Row]:
    return [Row(**row) for row in json.loads(file.read_text())]
