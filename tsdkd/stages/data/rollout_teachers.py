"""Which of several teachers reads a recorded response: the one that its rollout names, or the one of its source."""

import shlex
from collections.abc import Collection
from pathlib import Path

from tsdkd.artifacts.reader import Artifact
from tsdkd.errors import InputError

SOURCE, TEACHER = "source", "teacher"
"""The columns of rollouts that can name a row's teacher."""


def column_of_teachers(rollouts: Artifact | None, teachers: Collection[str], given: str | None) -> str | None:
    """The column of the prompts that names each row's teacher, as given or as the rollouts record it; None where an
    only teacher has no name. `rollouts`: None for prompts alone.

    Raises InputError for a column that the rollouts do not record, and where none is known.
    """
    recorded = rollouts.manifest.config.get("teacher_by") if rollouts else None
    if "" in teachers:
        if given is None:
            return None
        raise InputError(
            f"--teacher-by {given} names the teacher of each response, and no teacher has a name.",
            "Give --teacher NAME=MODEL for each name, or leave out --teacher-by.",
        )
    column = given or recorded
    if column is None and rollouts:
        raise InputError(
            f"Several teachers are given, and {rollouts.path} records none by name.",
            "Add --teacher-by source, or run `tsdkd generate` with --teacher-by COLUMN.",
        )
    if column is None:
        raise InputError(
            "Several teachers are given, and no column names the teacher of each prompt.", "Add --teacher-by COLUMN."
        )
    if rollouts and column not in {recorded, SOURCE}:
        raise InputError(
            f"{rollouts.path} does not record the column {column!r} of the prompts.",
            f"Run `tsdkd generate` with --teacher-by {column}.",
        )
    return str(column)


def naming_column(rollouts: Artifact, teacher_by: str | None) -> str:
    """The column of the rollouts that names each row's teacher. `teacher_by`: as `column_of_teachers` returns it."""
    return SOURCE if teacher_by == SOURCE != rollouts.manifest.config.get("teacher_by") else TEACHER


def unknown_teacher(path: Path, sample_id: str, name: str | None, teachers: Collection[str]) -> InputError:
    """The error for a response of the rollouts at `path` whose teacher is not among those with these names."""
    named = f"names the teacher {name!r}" if name else "names no teacher"
    return InputError(
        f"The response {sample_id} of {path} {named}; the teachers are {', '.join(teachers)}.",
        f"Add --teacher {shlex.quote(f'{name}=MODEL')}, or correct the prompts." if name else "Correct the prompts.",
    )
