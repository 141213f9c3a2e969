"""Runs the study: python -m recipes.study.run DIRECTORY [--tasks "sums plans"] [--methods "gkd tsdkd"] [--seeds "1 2"]

Complete arms are skipped, so the same command resumes an interrupted study. Each task has a directory, which a bench of
the same task may share.
"""

import argparse
from collections.abc import Sequence
from contextlib import ExitStack, chdir
from dataclasses import dataclass, replace
from pathlib import Path

from recipes.experiment import arms
from recipes.experiment.arms import Arm
from recipes.experiment.commands import exit_statuses
from recipes.experiment.settings import Settings, read_numbers
from recipes.experiment.tasks import find_task
from recipes.experiment.workers import Workers, open_workers
from recipes.study.questions import QUESTIONS, StudyArm, every_arm
from tsdkd.artifacts.locks import lock_for_writing
from tsdkd.errors import InputError


@dataclass(frozen=True)
class Study:
    """The arms of one task, in its directory."""

    root: Path
    settings: Settings
    arms: list[StudyArm]

    def prepare(self, workers: Workers) -> None:
        """Make the models, the prompts, and the teacher's responses."""
        workers.show(f"{self.settings.task}: models, prompts and the teacher's responses")
        with chdir(self.root):
            arms.prepare(find_task(self.settings))
        starts = sorted({arm.start for arm in self.arms} | {None}, key=lambda start: start or 0)
        seeds = [(self.settings, self.root, seed, starts) for seed in self.settings.seeds]
        workers.each(f"{self.settings.task}: students", arms.prepare_seed, seeds)

    def run_seed(self, workers: Workers, seed: int) -> None:
        """Train and measure all arms of a seed, and measure its students before training."""
        rate = find_task(self.settings).conditions.rate
        before = [Arm(seed, "test", start=start) for start in dict.fromkeys(arm.start for arm in self.arms)]
        chosen = [*before, *(arm.of_seed(seed, rate) for arm in self.arms)]
        arms.run_arms(workers, f"{self.settings.task}, seed {seed}", self.settings, self.root, chosen)


def find_studies(
    directory: Path, tasks: Sequence[str], scale: str, seeds: tuple[int, ...], methods: Sequence[str] = ()
) -> list[Study]:
    """The study of each task, with the arms of the named methods and those they are compared with, or all.

    Raises InputError for an unknown method and for a task without an arm.
    """
    names = {arm.entry.name for arm in every_arm()}
    if unknown := set(methods) - names:
        raise InputError(f"The study has no method {min(unknown)}.", f"Choose METHODS from: {' '.join(sorted(names))}.")
    tiny = [replace(arm, start=None) for arm in QUESTIONS[0].groups[0][:2]]
    chosen = tiny if scale == "tiny" else every_arm(methods)
    studies = []
    for task in tasks or dict.fromkeys(arm.task for arm in chosen):
        if not (found := [arm for arm in chosen if arm.task == task]):
            known = " ".join(dict.fromkeys(arm.task for arm in chosen))
            raise InputError(f"The study has no arm on {task}.", f"Choose TASKS from: {known}.")
        studies.append(Study(directory / task, Settings(task, scale, seeds), found))
    return studies


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--tasks", default="")
    parser.add_argument("--methods", default="")
    parser.add_argument("--seeds", default="1 2 3 4")
    parser.add_argument("--scale", choices=("full", "tiny"), default="full")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    with exit_statuses():
        seeds = read_numbers("SEEDS", options.seeds, int)
        tasks, methods = options.tasks.split(), options.methods.split()
        studies = find_studies(options.directory.resolve(), tasks, options.scale, seeds, methods)
        with ExitStack() as locks, open_workers(options.workers) as workers:
            for study in studies:
                study.root.mkdir(parents=True, exist_ok=True)
                locks.enter_context(lock_for_writing(study.root))
                study.settings.record(study.root, find_task(study.settings).conditions)
                study.prepare(workers)
            for seed in seeds:  # an interrupted study has all arms of its complete seeds
                for study in studies:
                    study.run_seed(workers, seed)


if __name__ == "__main__":
    main()
