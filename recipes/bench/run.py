"""Runs a bench: python -m recipes.bench.run DIRECTORY --task plans [--methods "gkd tsdkd"] [--plan-only]

Complete arms are skipped, so the same command resumes an interrupted bench, and more methods or seeds add arms.
"""

import argparse
import json
import math
import random
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path

from recipes.bench import page
from recipes.bench.methods import choose_entries
from recipes.bench.plan import make_plan, seeds_of_students
from recipes.experiment import arms
from recipes.experiment.arms import SPLITS, Arm
from recipes.experiment.commands import exit_statuses
from recipes.experiment.conditions import Conditions
from recipes.experiment.entries import Entry
from recipes.experiment.measures import RESULT
from recipes.experiment.settings import FACTORS, SEARCH_SEED, Settings, read_numbers
from recipes.experiment.tasks import find_task, require_models
from recipes.experiment.workers import Workers, open_workers
from tsdkd.artifacts.locks import lock_for_writing


@dataclass(frozen=True)
class Bench:
    """One bench in a directory."""

    root: Path
    settings: Settings
    entries: list[Entry]
    workers: int

    def run(self, hours: float, *, plan_only: bool) -> None:
        """Prepare, plan, search, measure and write the page. Raises InputError where the plan exceeds the hours."""
        task = find_task(self.settings)
        if self.settings.task == "own":
            require_models(self.settings)
        self.root.mkdir(parents=True, exist_ok=True)
        with lock_for_writing(self.root), open_workers(self.workers) as workers:
            self.settings.record(self.root, task.conditions)
            workers.show("models, prompts and the teacher's responses")
            with chdir(self.root):
                arms.prepare(task)
            arms.prepare_seed(self.settings, self.root, SEARCH_SEED)
            for split in SPLITS:
                arms.run_arm(self.settings, self.root, Arm(SEARCH_SEED, split))
            probed = [(self.settings, self.root, entry, SEARCH_SEED) for entry in self.entries]
            workers.each(f"{arms.PROBE_STEPS} steps of each method", arms.probe, probed)
            probes = {arguments[2].name: arms.probe(*arguments) for arguments in probed}
            plan = make_plan(self.root, self.settings, task, self.entries, probes, self.workers)
            workers.show(plan.format())
            plan.require_at_most(hours)
            if plan_only:
                return
            chosen = self._search(task.conditions, workers)
            seeds = [(self.settings, self.root, seed) for seed in self.settings.seeds]
            workers.each("students", arms.prepare_seed, seeds)
            for seed in self.settings.seeds:  # an interrupted bench has all methods of its complete seeds
                test = [Arm(seed, "test", entry, rate) for entry, rate in chosen.items()]
                random.Random(seed).shuffle(test)  # so that no method always runs beside the same one
                before = [Arm(seed, "test")] if seed in seeds_of_students(task, self.settings) else []
                arms.run_arms(workers, f"seed {seed}", self.settings, self.root, [*before, *test])
                page.write(self.root, self.settings, task.conditions, chosen, plan)
            workers.show(f"page: {self.root / page.PAGE}")

    def _search(self, conditions: Conditions, workers: Workers) -> dict[Entry, float]:
        """The learning rate of each entry, chosen on the validation split alone."""
        rates = conditions.rates(self.settings.factors)
        search = {entry: [page.search_arm(entry, rate) for rate in rates] for entry in self.entries}
        every = [arm for found in search.values() for arm in found]
        arms.run_arms(workers, "search", self.settings, self.root, every)
        return {entry: choose_rate(found, self.root) for entry, found in search.items()}


def choose_rate(search: list[Arm], root: Path) -> float:
    """The rate of the highest mean of greedy and sampled accuracy, then of the lowest divergence.

    A training that is not finite is the worst.
    """

    def quality(arm: Arm) -> tuple[float, float]:
        result = json.loads((root / arm.directory / RESULT).read_text())
        return result.get("accuracy", 0.0) + result.get("sampled_accuracy", 0.0), -result.get("kl", math.inf)

    return max(search, key=quality).rate


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    for name in ("task", "scale", "methods", "teacher", "student", "prompts", "benchmark", "eval-options"):
        parser.add_argument(f"--{name}", default="")
    parser.add_argument("--engine", default="transformers")
    parser.add_argument("--response-tokens", type=int, default=512)
    parser.add_argument("--seeds", default="1 2 3 4")
    parser.add_argument("--factors", default=" ".join(map(str, FACTORS)))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--hours", type=float, default=12.0)
    parser.add_argument("--plan-only", action="store_true")
    options = parser.parse_args()
    with exit_statuses():
        settings = Settings(
            task=options.task,
            scale=options.scale,
            seeds=read_numbers("SEEDS", options.seeds, int),
            factors=read_numbers("FACTORS", options.factors, float),
            **{name: _absolute(getattr(options, name)) for name in ("teacher", "student", "prompts", "benchmark")},
            eval_options=options.eval_options,
            engine=options.engine,
            response_tokens=options.response_tokens,
        )
        settings.require_seeds()
        bench = Bench(options.directory.resolve(), settings, choose_entries(options.methods), options.workers)
        bench.run(options.hours, plan_only=options.plan_only)


def _absolute(value: str) -> str:
    """An existing path as an absolute one; other words, such as hub ids, unchanged."""
    return str(Path(value).resolve()) if value and Path(value).exists() else value


if __name__ == "__main__":
    main()
