"""The results of the study: of the arms in a directory, and of rows that were measured elsewhere."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from recipes.experiment.arms import Arm, result_row, seed_directories
from recipes.experiment.measures import RESULT
from recipes.experiment.settings import Settings
from recipes.experiment.statistics import Runs
from recipes.experiment.tasks import find_task
from recipes.study.questions import StudyArm, every_arm
from tsdkd.errors import InputError

ArmOfTask = tuple[str, Arm]
"""A task, and an arm whose seed has no meaning."""


def arm_of_task(arm: StudyArm) -> ArmOfTask:
    return arm.task, arm.of_seed(0, find_task(Settings(arm.task)).conditions.rate)


def student_of_task(task: str, start: int | None) -> ArmOfTask:
    """The student before training."""
    return task, Arm(0, "test", start=start)


@dataclass(frozen=True)
class Results:
    """The measures of each arm by seed, in the order of the questions; the students before training come first."""

    runs: Mapping[ArmOfTask, Runs]

    def of(self, arm: ArmOfTask) -> Runs:
        return self.runs.get(arm, {})

    def rows(self) -> list[dict[str, object]]:
        """A row for each arm and seed."""
        return [
            result_row(task, replace(arm, seed=seed), measures)
            for (task, arm), runs in self.runs.items()
            for seed, measures in runs.items()
        ]


def read_results(directory: Path, recorded: Path) -> Results:
    """The results of the arms in a directory; for other seeds, those of the rows in a file.

    Raises InputError for a row that was measured with other options than its arm has.
    """
    rows = list(map(json.loads, recorded.read_text().splitlines())) if recorded.is_file() else []
    found = {arm: _recorded_runs(rows, *arm, recorded) | _runs(directory, *arm) for arm in _every_arm()}
    return Results({arm: dict(sorted(runs.items())) for arm, runs in found.items() if runs})


def _every_arm() -> Iterator[ArmOfTask]:
    yield from dict.fromkeys(student_of_task(arm.task, arm.start) for arm in every_arm())
    yield from map(arm_of_task, every_arm())


def _runs(directory: Path, task: str, arm: Arm) -> Runs:
    files = {seed: seed / arm.directory.name / RESULT for seed in seed_directories(directory / task)}
    return {
        int(seed.name.removeprefix("seed-")): json.loads(file.read_text())
        for seed, file in files.items()
        if file.is_file()
    }


def _recorded_runs(rows: list[dict[str, object]], task: str, arm: Arm, file: Path) -> Runs:
    wanted = result_row(task, arm, {"entry": arm.entry.identity} if arm.entry else {})
    names = [name for name in wanted if name not in {"seed", "entry"}]
    chosen = [row for row in rows if all(row[name] == wanted[name] for name in names)]
    if any(row.get("entry") != wanted.get("entry") for row in chosen):
        raise InputError(
            f"{file} has rows of {wanted['method']} on {task} with other options.", "Delete them, or rename the entry."
        )
    return {row["seed"]: {name: row[name] for name in row if name not in {*names, "seed"}} for row in chosen}
