"""The plan of a bench: hours of each method, from a probe of it and the measurement of a student before training."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from recipes.experiment.arms import STUDENT_SECONDS, Arm
from recipes.experiment.conditions import ExperimentTask
from recipes.experiment.entries import Entry
from recipes.experiment.measures import RESULT
from recipes.experiment.settings import SEARCH_SEED, Settings
from tsdkd.errors import InputError

HOUR = 3600


@dataclass(frozen=True)
class Plan:
    """Seconds of one process for each method, and for the students: to make missing ones, and to measure all."""

    methods: dict[str, float]
    students: float
    workers: int

    @property
    def hours(self) -> float:
        """Wall clock, with all workers busy."""
        return (sum(self.methods.values()) + self.students) / self.workers / HOUR

    def format(self) -> str:
        lines = [f"  {seconds / HOUR:7.2f}  {name}" for name, seconds in self.methods.items()]
        lines += [f"  {self.students / HOUR:7.2f}  (students)"]
        return "\n".join(
            ["hours of one process:", *lines, f"in all {self.hours:.2f} hours with {self.workers} workers"]
        )

    def require_at_most(self, hours: float) -> None:
        """Raise InputError if the plan exceeds these hours."""
        if self.hours > hours:
            raise InputError(
                f"The plan takes {self.hours:.1f} hours, more than {hours:g}.",
                "Name fewer METHODS, a shorter grid FACTORS, or more HOURS.",
            )


def make_plan(
    root: Path,
    settings: Settings,
    task: ExperimentTask,
    entries: Sequence[Entry],
    probes: dict[str, dict[str, float]],
    workers: int,
) -> Plan:
    """The plan of a whole bench. It includes arms that are complete, but no students that exist."""
    before = {split: _result(root / Arm(SEARCH_SEED, split).directory) for split in ("validation", "test")}
    trainings = len(settings.factors), len(settings.seeds)
    measuring = sum(count * before[split]["measuring_seconds"] for count, split in zip(trainings, before, strict=True))
    methods = {}
    for entry in entries:
        seconds = probes[entry.name]
        training = task.conditions.steps * seconds["step"] + seconds["other"]
        methods[entry.name] = sum(trainings) * training + measuring
    student = float((root / f"seed-{SEARCH_SEED}" / STUDENT_SECONDS).read_text())
    missing = [seed for seed in settings.seeds if not (root / f"seed-{seed}" / STUDENT_SECONDS).is_file()]
    measured = len(seeds_of_students(task, settings)) * before["test"]["measuring_seconds"]
    return Plan(methods, student * len(missing) + measured, workers)


def seeds_of_students(task: ExperimentTask, settings: Settings) -> tuple[int, ...]:
    """The seeds whose student is measured before training."""
    return settings.seeds[:1] if task.one_student else settings.seeds


def _result(directory: Path) -> dict[str, float]:
    return json.loads((directory / RESULT).read_text())
