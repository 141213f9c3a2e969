"""What every task of an experiment has: conditions, which are equal for all methods, and models and prompts."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

Rows = list[dict[str, object]]


@dataclass(frozen=True)
class Sizes:
    """Numbers of prompts. Every method learns from one response to each training prompt."""

    train: int
    validation: int
    test: int
    held_out: int
    """The number of validation prompts, and of test prompts, that measure the divergence on the teacher's responses."""
    sampled: int | None = None
    """The number of prompts that measure sampled accuracy; None: all of the split."""


@dataclass(frozen=True)
class Conditions:
    """The settings that are equal for all methods of a task."""

    batch: int
    """Responses per step."""
    response_tokens: int
    rate: float
    """The middle of the grid of learning rates."""
    sizes: Sizes
    engine: str = "transformers"
    k: int | None = None
    """The k of every method that has one; None: each method's default."""
    sample_batch: int = 250
    """Responses that are sampled together outside training."""
    scheduled: float = 0.05
    """The fraction of the training prompts that DistiLLM's schedule measures on; it does not train on them."""
    benchmark: str = ""
    """The benchmark of `tsdkd eval` that measures test accuracy; "": the task's `is_correct` decides."""
    eval_options: str = ""

    @property
    def steps(self) -> int:
        return self.sizes.train // self.batch

    def rates(self, factors: Iterable[float]) -> list[float]:
        """The grid of learning rates."""
        return [factor * self.rate for factor in factors]


class ExperimentTask(Protocol):
    """A teacher, a student for each seed, and prompts in three splits."""

    conditions: Conditions
    one_student: bool
    """Whether all seeds start from the same student, so that one measurement of it is enough."""

    def splits(self) -> dict[str, Rows]:
        """The prompts of "train", "validation" and "test"."""

    @property
    def is_correct(self) -> Callable[[str, str], bool] | None:
        """Whether the response, the second argument, answers the prompt; None: a benchmark measures accuracy."""

    def make_teacher(self) -> None:
        """Make the teacher in the working directory. A teacher that exists is kept."""

    def make_students(self, seed: int, outputs: Mapping[int | None, Path]) -> None:
        """Make a seed's students. One that exists is kept.

        outputs: directories, by the accuracy in percent at which the student is taken; None: the task's default.
        """

    def teacher(self) -> str:
        """The value of `--teacher`."""

    def student(self, output: Path) -> str:
        """The value of `--student` for the student that `make_students` made in `output`."""
