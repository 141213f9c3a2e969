"""The paper's numbers (paper.json): its tables and figures by name, rows named as the recipes name theirs."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tsdkd.errors import InputError
from tsdkd.stages.results.benchmarks import BENCHMARKS

PUBLISHED = Path(__file__).with_name("paper.json")
AVERAGE = "average"


@dataclass(frozen=True, slots=True)
class PublishedTable:
    """A table, or a figure's points."""

    names: tuple[str, ...]
    """The model pair first, where the table is the main one of a pair."""
    rows: dict[str, dict[str, float]]
    """By method, then by benchmark: accuracies in percent."""
    models: tuple[str, ...] = ()
    """What names the pair's teacher and its student."""
    averaged: tuple[str, ...] = ()
    """Of a figure, which has the average alone: the benchmarks it is of."""
    notes: str = ""

    def shared(self, benchmarks: Iterable[str]) -> tuple[str, ...]:
        """Those of these benchmarks that the paper has here."""
        known = {*self.averaged, *(one for row in self.rows.values() for one in row)}
        return tuple(one for one in benchmarks if BENCHMARKS[one].base in known)

    def shares(self, benchmarks: Sequence[str]) -> dict[str, dict[str, float]]:
        """The rows in [0, 1] by these benchmarks; none where a figure's average is of others."""
        if self.averaged and {BENCHMARKS[one].base for one in self.shared(benchmarks)} != {*self.averaged}:
            return {}
        of = {one: BENCHMARKS[one].base for one in benchmarks} | {AVERAGE: AVERAGE}
        found = {
            name: {one: row[base] / 100 for one, base in of.items() if base in row} for name, row in self.rows.items()
        }
        return {name: row for name, row in found.items() if row}

    def told(self, benchmarks: Sequence[str]) -> list[str]:
        """What to know when these benchmarks stand beside it."""
        name, shared = self.names[0], self.shared(benchmarks)
        lines = [f"paper, {name}: {self.notes}"] if self.notes else []
        if self.rows and not self.shares(benchmarks):
            wanted = f"only the average of {', '.join(self.averaged)}" if self.averaged else "none of these benchmarks"
            lines = [f"paper, {name}: it has {wanted}"]
        if 0 < len(shared) < len(benchmarks):
            lines.append(f"average: of {', '.join(shared)}, which {name} of the paper has")
        return lines


@cache
def published_tables() -> tuple[PublishedTable, ...]:
    """All there are, in the paper's order."""
    return tuple(
        PublishedTable(
            names=tuple(table["names"]),
            rows=table["rows"],
            models=tuple(table.get("models", ())),
            averaged=tuple(table.get("averaged", ())),
            notes=table.get("notes", ""),
        )
        for table in json.loads(PUBLISHED.read_text())["tables"]
    )


def find_table(name: str) -> PublishedTable:
    """By any of its names. Raises InputError that lists them."""
    named = {known: table for table in published_tables() for known in table.names}
    if name not in named:
        raise InputError(f"The paper has no {name!r} here.", f"Choose from: {', '.join(named)}.")
    return named[name]


def matching_table(models: Iterable[str]) -> PublishedTable | None:
    """The main table of the pair to which one of the models belongs, by name."""
    names = [model.lower() for model in models]
    return next(
        (table for table in published_tables() if any(word in name for word in table.models for name in names)), None
    )
