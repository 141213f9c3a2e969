"""The units of scoring: those rows of one part of the rollouts that one teacher reads."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import pyarrow as pa

from tsdkd.artifacts.files import teacher_file
from tsdkd.artifacts.manifest import Part
from tsdkd.artifacts.reader import Artifact
from tsdkd.errors import InputError

SOURCE, TEACHER = "source", "teacher"
"""The columns of rollouts that can name a row's teacher."""


@dataclass(frozen=True, slots=True)
class Unit:
    """Rows of the rollouts that become one part of the scores."""

    part: Part
    """Of the rollouts."""
    teacher: str
    file: str
    """The part of the scores."""
    rows: Sequence[int]
    """Of the part, in order."""

    def read(self, rollouts: Artifact, columns: list[str]) -> pa.Table:
        table = rollouts.read_part(self.part, columns)
        return table if len(self.rows) == len(table) else table.take(self.rows)


def divide_rollouts(rollouts: Artifact, teachers: Collection[str], teacher_by: str | None) -> list[Unit]:
    """The units of each teacher, one teacher after the other, in the order of `teachers`. An only teacher without a
    name, "", reads all rows.

    `teacher_by`: as `column_of_teachers` returns it.
    Raises InputError for a row that names no teacher, or another one.
    """
    if "" in teachers:
        return [Unit(part, "", part.file, range(part.rows or 0)) for part in rollouts.tables]
    column = SOURCE if teacher_by == SOURCE != rollouts.manifest.config.get("teacher_by") else TEACHER
    units = [
        Unit(part, teacher, teacher_file(part.file, index if len(teachers) > 1 else None), rows)
        for part in rollouts.tables
        for index, (teacher, rows) in enumerate(_rows_by_teacher(rollouts, part, column, teachers).items())
        if rows
    ]
    return sorted(units, key=lambda unit: list(teachers).index(unit.teacher))


def column_of_teachers(rollouts: Artifact, teachers: Collection[str], given: str | None) -> str | None:
    """The column of the prompts that names each row's teacher, as given or as the rollouts record it; None where an
    only teacher has no name.

    Raises InputError for a column that the rollouts do not record, and where none is known.
    """
    recorded = rollouts.manifest.config.get("teacher_by")
    if "" in teachers:
        if given is None:
            return None
        raise InputError(
            f"--teacher-by {given} names the teacher of each response, and no teacher has a name.",
            "Give --teacher NAME=MODEL for each name, or leave out --teacher-by.",
        )
    column = given or recorded
    if column is None:
        raise InputError(
            f"Several teachers are given, and {rollouts.path} records none by name.",
            "Add --teacher-by source, or run `tsdkd generate` with --teacher-by COLUMN.",
        )
    if column not in {recorded, SOURCE}:
        raise InputError(
            f"{rollouts.path} does not record the column {column!r} of the prompts.",
            f"Run `tsdkd generate` with --teacher-by {column}.",
        )
    return str(column)


def _rows_by_teacher(
    rollouts: Artifact, part: Part, column: str, teachers: Collection[str]
) -> dict[str, Sequence[int]]:
    table = rollouts.read_part(part, ["sample_id", column])
    by_teacher: dict[str, list[int]] = {name: [] for name in teachers}
    for row, name in enumerate(table[column].to_pylist()):
        if name not in by_teacher:
            named = f"names the teacher {name!r}" if name else "names no teacher"
            raise InputError(
                f"The response {table['sample_id'][row]} of {rollouts.path} {named}; the teachers are "
                f"{', '.join(teachers)}.",
                f"Add --teacher {name}=MODEL, or correct the prompts." if name else "Correct the prompts.",
            )
        by_teacher[name].append(row)
    return dict(by_teacher)
