"""The paper's numbers (paper.json): tables and figures by name; rows carry the names that the recipes use."""

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
    """A table of the paper, or the points of a figure."""

    names: tuple[str, ...]
    """The main table of a model pair starts with the pair's name."""
    rows: dict[str, dict[str, float]]
    """By method, then by benchmark: accuracies in percent."""
    models: tuple[str, ...] = ()
    """Parts of the names of the pair's teacher and student."""
    averaged: tuple[str, ...] = ()
    """Of a figure, whose rows hold only an average: the benchmarks in it."""
    notes: str = ""

    def common_benchmarks(self, benchmarks: Iterable[str]) -> tuple[str, ...]:
        """Those of the given benchmarks that the table reports."""
        reported = {*self.averaged, *(benchmark for row in self.rows.values() for benchmark in row)}
        return tuple(name for name in benchmarks if BENCHMARKS[name].base in reported)

    def accuracies(self, benchmarks: Sequence[str]) -> dict[str, dict[str, float]]:
        """The rows in [0, 1] by the given benchmarks; empty when a figure averages over other benchmarks."""
        if self.averaged and {BENCHMARKS[name].base for name in self.common_benchmarks(benchmarks)} != {*self.averaged}:
            return {}
        bases = {name: BENCHMARKS[name].base for name in benchmarks} | {AVERAGE: AVERAGE}
        rows = {
            method: {name: row[base] / 100 for name, base in bases.items() if base in row}
            for method, row in self.rows.items()
        }
        return {method: row for method, row in rows.items() if row}

    def describe(self, benchmarks: Sequence[str]) -> list[str]:
        """Notes for a comparison of the given benchmarks with this table."""
        name, common = self.names[0], self.common_benchmarks(benchmarks)
        notes = [f"paper, {name}: {self.notes}"] if self.notes else []
        if self.rows and not self.accuracies(benchmarks):
            reported = (
                f"only the average of {', '.join(self.averaged)}" if self.averaged else "none of these benchmarks"
            )
            notes = [f"paper, {name}: the paper reports {reported}"]
        if 0 < len(common) < len(benchmarks):
            notes.append(f"average: it covers {', '.join(common)}, which the paper reports in {name}")
        return notes


@cache
def published_tables() -> tuple[PublishedTable, ...]:
    """All tables and figures, in the paper's order."""
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
    """The table with this name. Raises InputError that lists all names."""
    tables = {known: table for table in published_tables() for known in table.names}
    if name not in tables:
        raise InputError(f"{name!r} is not a table or figure of the paper.", f"Choose from: {', '.join(tables)}.")
    return tables[name]


def matching_table(models: Iterable[str]) -> PublishedTable | None:
    """The main table of the pair to which one of the models belongs by its name."""
    names = [model.lower() for model in models]
    return next(
        (table for table in published_tables() if any(part in name for part in table.models for name in names)), None
    )
