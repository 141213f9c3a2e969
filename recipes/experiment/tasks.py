"""The tasks: sums and plans with models trained from scratch, the embedded pair, and a task of the user's own."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from recipes.experiment import models
from recipes.experiment.commands import run_tsdkd
from recipes.experiment.conditions import Conditions, ExperimentTask, Rows, Sizes
from recipes.experiment.plans import ONE_PLAN, PLANS, SHORT_PLANS
from recipes.experiment.settings import Settings
from recipes.experiment.sums import SUMS
from recipes.experiment.task import Shape, Task
from tsdkd.errors import InputError
from tsdkd.stages.data.embedded import make as stories
from tsdkd.stages.data.prompts import Prompts
from tsdkd.stages.models.record import model_record, require_same_tokenizer
from tsdkd.stages.results.benchmarks import choose_benchmarks


@dataclass(frozen=True)
class MadeTask:
    """A teacher and students trained from scratch."""

    task: Task
    conditions: Conditions
    teacher_accuracy: int
    student_accuracy: int
    dev: int
    """Problems on which the accuracies are measured while the models are made."""
    one_student = False

    def splits(self) -> dict[str, Rows]:
        problems = self._problems()
        return {name: [{"prompt": problem} for problem in problems[name]] for name in ("train", "validation", "test")}

    def is_correct(self, prompt: str, response: str) -> bool:
        return self.task.is_correct(prompt, response)

    def make_teacher(self) -> None:
        if Path("teacher").is_dir():
            return
        goal, shape = self.teacher_accuracy, self.task.teacher
        columns = TextColumn("teacher"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}")
        with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn()) as progress:
            bar = progress.add_task("", total=shape.steps)

            def advance(accuracy: float) -> None:
                progress.update(bar, advance=1, description=f"steps at most, accuracy {accuracy:.0f} of {goal} %")

            self._make(shape, 7, [(goal, Path("teacher"))], advance, decay=True)

    def make_students(self, seed: int, outputs: Mapping[int | None, Path]) -> None:
        goals = [(self.student_accuracy if start is None else start, output) for start, output in outputs.items()]
        if missing := [(goal, output) for goal, output in goals if not output.is_dir()]:
            self._make(self.task.student, seed, missing, lambda _: None, decay=False)

    def teacher(self) -> str:
        return "teacher"

    def student(self, output: Path) -> str:
        return str(output)

    def _make(
        self, shape: Shape, seed: int, goals: models.Goals, advance: Callable[[float], None], *, decay: bool
    ) -> None:
        """Make a model that has not seen the problems of validation and test."""
        problems = self._problems()
        unseen = [*problems["validation"], *problems["test"], *problems["dev"]]
        models.make(self.task, shape, seed, goals, problems["dev"], unseen, advance, decay=decay)

    def _problems(self) -> dict[str, list[str]]:
        sizes = self.conditions.sizes
        parts = {"train": sizes.train, "validation": sizes.validation, "test": sizes.test, "dev": self.dev}
        return dict(zip(parts, self.task.split(*parts.values()), strict=True))


@dataclass(frozen=True)
class StoryTask:
    """The embedded teacher, and a student that starts from its responses: the teacher without six of its layers."""

    conditions: Conditions
    start_options: str = "--epochs 2 --batch-size 8 --learning-rate 1e-4"
    one_student = False

    def splits(self) -> dict[str, Rows]:
        return {name: [{"messages": stories.messages(story)} for story in part] for name, part in self.parts.items()}

    @cached_property
    def parts(self) -> dict[str, Rows]:
        """The stories of the embedded prompts, and some that are in none of the embedded files."""
        sizes = self.conditions.sizes
        stream = stories.stories(stories.SEED)
        train = list(islice(stream, stories.SIZES["prompts"]))[: sizes.train]
        list(islice(stream, stories.SIZES["held_out"] + stories.SIZES["benchmark"]))
        return {"train": train} | {name: list(islice(stream, getattr(sizes, name))) for name in ("validation", "test")}

    @cached_property
    def by_prompt(self) -> dict[str, dict[str, Any]]:
        """The story of each prompt."""
        return {str(story["prompt"]): story for part in self.parts.values() for story in part}

    def is_correct(self, prompt: str, response: str) -> bool:
        """Whether the response names the right one of the story's two values, and not the other."""
        return self.named_values(prompt, response) == [self.by_prompt[prompt]["answer"]]

    def named_values(self, prompt: str, response: str) -> list[str]:
        """Those of the story's two values that the response names, in its order."""
        found: dict[str, int] = {}
        for value in self.by_prompt[prompt]["choices"]:
            if match := re.search(rf"\b{re.escape(value)}\b", response, re.IGNORECASE):
                found[value] = match.start()
        return sorted(found, key=found.__getitem__)

    def make_teacher(self) -> None:
        run_tsdkd(Path(), "prune --output before --drop 6 --limit 4")

    def make_students(self, seed: int, outputs: Mapping[int | None, Path]) -> None:
        for output in outputs.values():
            run_tsdkd(
                output.parent,
                f"train --method supervised-kd --student before --teacher embedded-teacher --rollouts teacher-train "
                f"--lambda 0 --checkpoint {output} --seed {seed} {self.start_options}",
            )

    def teacher(self) -> str:
        return "embedded-teacher"

    def student(self, output: Path) -> str:
        return str(output)


@dataclass(frozen=True)
class OwnTask:
    """Models, prompts and a benchmark of the user; validation measures the divergence alone."""

    conditions: Conditions
    settings: Settings
    one_student = True
    is_correct = None

    def splits(self) -> dict[str, Rows]:
        stream, sizes = iter(_own_prompts(self.settings)), self.conditions.sizes
        return {name: list(islice(stream, getattr(sizes, name))) for name in ("validation", "test", "train")}

    def make_teacher(self) -> None:
        pass

    def make_students(self, seed: int, outputs: Mapping[int | None, Path]) -> None:
        pass

    def teacher(self) -> str:
        return self.settings.teacher

    def student(self, output: Path) -> str:
        return self.settings.student


def _made(task: Task, *, steps: int) -> Callable[[Settings], ExperimentTask]:
    full = MadeTask(
        task,
        Conditions(32, task.response_tokens, 1e-4, Sizes(32 * steps, 400, 1000, 200), k=5),
        teacher_accuracy=99,
        student_accuracy=85,
        dev=200,
    )
    shape = Shape(width=16, inner=32, layers=1, rate=1e-3, steps=10, batch=4)
    small = replace(
        full,
        task=replace(task, teacher=shape, student=shape),
        conditions=replace(full.conditions, batch=4, response_tokens=16, sizes=Sizes(8, 4, 4, 4), scheduled=0.25),
        teacher_accuracy=0,
        student_accuracy=0,
        dev=2,
    )
    return lambda settings: small if settings.scale == "tiny" else full


def _embedded(settings: Settings) -> ExperimentTask:
    tiny = settings.scale == "tiny"
    sizes = Sizes(8, 4, 4, 2, sampled=2) if tiny else Sizes(384, 450, 1800, 90, sampled=450)
    conditions = Conditions(4 if tiny else 8, 16, 5e-6, sizes, sample_batch=64, scheduled=0.25 if tiny else 0.05)
    return StoryTask(conditions, "--epochs 1 --batch-size 8 --learning-rate 1e-4" if tiny else StoryTask.start_options)


def _own(settings: Settings) -> ExperimentTask:
    for name in ("teacher", "student", "prompts", "benchmark"):
        if not getattr(settings, name):
            raise InputError(f"{name.upper()} is missing.", "Set TEACHER, STUDENT, PROMPTS and BENCHMARK, or TASK.")
    benchmark, *others = choose_benchmarks(settings.benchmark.split(","))
    if others:
        raise InputError(f"BENCHMARK={settings.benchmark} names several.", "Give one.")
    tiny = settings.scale == "tiny"
    batch, measured = (4, 4) if tiny else (32, 128)
    steps = (len(_own_prompts(settings)) - 2 * measured) // batch
    if steps < 1:
        raise InputError(
            f"{settings.prompts} has {len(_own_prompts(settings))} prompts.",
            f"Give {2 * measured + batch} or more: {measured} validate, {measured} test, the others are trained on.",
        )
    sizes = Sizes(batch * (min(steps, 2) if tiny else steps), measured, measured, measured)
    scheduled = 0.25 if tiny else 0.05
    tokens = min(16, settings.response_tokens) if tiny else settings.response_tokens
    conditions = Conditions(
        *(batch, tokens, 5e-6, sizes, settings.engine),
        sample_batch=32,
        scheduled=scheduled,
        benchmark=benchmark.name,
        eval_options=settings.eval_options,
    )
    return OwnTask(conditions, settings)


def require_models(settings: Settings) -> None:
    """Raise InputError for an unknown teacher or student, and for two that have different tokenizers."""
    teacher, student = (model_record(role, getattr(settings, role), hashed=False) for role in ("teacher", "student"))
    require_same_tokenizer(teacher, student)


@cache
def _own_prompts(settings: Settings) -> Rows:
    """Raises InputError for a file that `tsdkd generate` would not read."""
    return [
        {"prompt_id": prompt.prompt_id, "messages": prompt.messages, "tools": prompt.tools}
        for prompt in Prompts(Path(settings.prompts))
    ]


TASKS: dict[str, Callable[[Settings], ExperimentTask]] = {
    "sums": _made(SUMS, steps=100),
    **{task.name: _made(task, steps=50) for task in (PLANS, SHORT_PLANS, ONE_PLAN)},  # of longer responses
    "embedded": _embedded,
    "own": _own,
}


def find_task(settings: Settings) -> ExperimentTask:
    """The task with its sizes. Raises InputError for an unknown one."""
    if settings.task not in TASKS:
        raise InputError(f"No task is named {settings.task}.", f"Choose TASK from: {', '.join(TASKS)}.")
    return TASKS[settings.task](settings)
