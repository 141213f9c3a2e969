"""Runs a bench: python -m recipes.bench.run DIRECTORY --task plans [--methods "gkd tsdkd"] [--plan-only]

Complete arms are skipped, so the same command resumes an interrupted bench, and more methods or seeds add arms.
"""

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import chdir, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from recipes.bench import arms, page
from recipes.bench.arms import SPLITS, Arm
from recipes.bench.methods import Entry, choose
from recipes.bench.plan import make_plan
from recipes.bench.settings import FACTORS, SEARCH_SEED, Settings
from recipes.bench.tasks import Conditions, find_task
from recipes.experiment.commands import INTERRUPTED
from recipes.experiment.measures import RESULT
from tsdkd.errors import InputError

Each: TypeAlias = Callable[[Callable[..., None], Iterable[tuple[Any, ...]]], list[None]]
"""Calls a function with each of several arguments."""


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
        self.settings.record(self.root)
        show(f"{time.strftime('%H:%M')} models, prompts and the teacher's responses")
        with chdir(self.root):
            arms.prepare(task)
        arms.prepare_seed(self.settings, self.root, SEARCH_SEED)
        for split in SPLITS:
            arms.run_arm(self.settings, self.root, Arm(SEARCH_SEED, split))
        show(f"{time.strftime('%H:%M')} {arms.PROBE_STEPS} steps of each method")
        # One after the other, and before the workers start, so that a step takes no less than here.
        probes = {entry.name: arms.probe(self.settings, self.root, entry, SEARCH_SEED) for entry in self.entries}
        plan = make_plan(self.root, self.settings, task.conditions, self.entries, probes, self.workers)
        show(plan.format())
        plan.require(hours)
        if plan_only:
            return
        with open_workers(self.workers) as each:
            chosen = self._search(task.conditions, each)
            each(arms.prepare_seed, [(self.settings, self.root, seed) for seed in self.settings.seeds])
            for seed in self.settings.seeds:  # an interrupted bench has all methods of its complete seeds
                test = [Arm(seed, "test"), *(Arm(seed, "test", entry, rate) for entry, rate in chosen.items())]
                self._run_arms(f"seed {seed}", test, each)
                page.write(self.root, self.settings, task.conditions, chosen, plan)
        show(f"page: {self.root / page.PAGE}")

    def _search(self, conditions: Conditions, each: Each) -> dict[Entry, float]:
        """The learning rate of each entry, chosen on the validation split alone."""
        rates = conditions.rates(self.settings.factors)
        search = {entry: [Arm(SEARCH_SEED, "validation", entry, rate) for rate in rates] for entry in self.entries}
        self._run_arms("search", [arm for found in search.values() for arm in found], each)
        return {entry: choose_rate(found, self.root) for entry, found in search.items()}

    def _run_arms(self, title: str, chosen: list[Arm], each: Each) -> None:
        with chdir(self.root):
            missing = [arm for arm in chosen if not arm.is_complete]
        show(f"{time.strftime('%H:%M')} {title}: {len(missing)} of {len(chosen)} arms to run")
        each(arms.run_arm, [(self.settings, self.root, arm) for arm in missing])


@contextmanager
def open_workers(number: int) -> Iterator[Each]:
    """Processes that call a function with each of several arguments; one worker is this process.

    After an error, calls that run end and no other begins.
    """
    if number == 1:
        yield lambda function, calls: [function(*arguments) for arguments in calls]
        return
    with ProcessPoolExecutor(number, multiprocessing.get_context("spawn")) as pool:

        def each(function: Callable[..., None], calls: Iterable[tuple[Any, ...]]) -> list[None]:
            running = [pool.submit(function, *arguments) for arguments in calls]
            return [call.result() for call in running]

        try:
            yield each
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def choose_rate(search: list[Arm], root: Path) -> float:
    """The learning rate with the highest validation accuracy, then with the lowest divergence."""

    def quality(arm: Arm) -> tuple[float, float]:
        result = json.loads((root / arm.directory / RESULT).read_text())
        return result.get("accuracy", 0.0), -result["kl"]

    return max(search, key=quality).rate


def show(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def seeds(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split()))


def factors(text: str) -> tuple[float, ...]:
    return tuple(map(float, text.split()))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    for name in ("task", "scale", "teacher", "student", "prompts", "benchmark", "methods"):
        parser.add_argument(f"--{name}", default="")
    parser.add_argument("--seeds", type=seeds, default=(1, 2, 3, 4))
    parser.add_argument("--factors", type=factors, default=FACTORS)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--hours", type=float, default=12.0)
    parser.add_argument("--plan-only", action="store_true")
    options = parser.parse_args()
    own = {name: getattr(options, name) for name in ("teacher", "student", "prompts", "benchmark")}
    try:
        settings = Settings(
            task=options.task,
            scale=options.scale,
            seeds=options.seeds,
            factors=options.factors,
            **{name: _absolute(value) for name, value in own.items()},
        )
        bench = Bench(options.directory.resolve(), settings, choose(options.methods), options.workers)
        bench.run(options.hours, plan_only=options.plan_only)
    except InputError as error:
        sys.stderr.write(f"error: {error.cause}\ntry:   {error.remedy}\n")
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        show("interrupted: run the same command again to continue")
        raise SystemExit(INTERRUPTED) from None


def _absolute(value: str) -> str:
    """A path that exists from the bench's own directory too; other words, such as hub ids, as they are."""
    return str(Path(value).resolve()) if value and Path(value).exists() else value


if __name__ == "__main__":
    main()
