"""The units of scoring: those rows of one part of the rollouts that one teacher reads."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import pyarrow as pa

from tsdkd.artifacts.files import teacher_file
from tsdkd.artifacts.manifest import Part
from tsdkd.artifacts.reader import Artifact
from tsdkd.stages.data.rollout_teachers import naming_column, unknown_teacher


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
    column = naming_column(rollouts, teacher_by)
    units = [
        Unit(part, teacher, teacher_file(part.file, index if len(teachers) > 1 else None), rows)
        for part in rollouts.tables
        for index, (teacher, rows) in enumerate(_rows_by_teacher(rollouts, part, column, teachers).items())
        if rows
    ]
    return sorted(units, key=lambda unit: list(teachers).index(unit.teacher))


def _rows_by_teacher(
    rollouts: Artifact, part: Part, column: str, teachers: Collection[str]
) -> dict[str, Sequence[int]]:
    table = rollouts.read_part(part, ["sample_id", column])
    by_teacher: dict[str, list[int]] = {name: [] for name in teachers}
    for row, name in enumerate(table[column].to_pylist()):
        if name not in by_teacher:
            raise unknown_teacher(rollouts.path, str(table["sample_id"][row]), name, teachers)
        by_teacher[name].append(row)
    return dict(by_teacher)
