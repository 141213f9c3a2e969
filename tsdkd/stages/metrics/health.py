"""Signs that a run degenerates: repeating responses, collapsing entropy or length. Steps that train no token."""

from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tsdkd.stages.metrics.names import SELECTED

COMPARED_STEPS = 5
"""The last `COMPARED_STEPS` steps are compared with the first `COMPARED_STEPS` steps."""
COLLAPSED_BELOW = 0.2
"""Entropy or length has collapsed below this fraction of its first value."""
REPEATING_ABOVE = 0.5
"""A response repeats itself when more than this fraction of its 4-grams occurred before in it."""
CHECK_SELECTION = "Check the conditions of `select` and its options; no teacher_rank exceeds k."
COLLAPSING_METRICS = {"student_entropy": "the student's entropy", "response_length": "the length of its responses"}


@dataclass(frozen=True, slots=True)
class Sign:
    """One sign that a run degenerates."""

    metric: str
    text: str
    is_new: bool
    """False when an earlier step showed the same sign."""


def is_repeating(ids: list[int]) -> bool:
    """Whether a response, as token ids, repeats itself."""
    grams = Counter(zip(*(ids[n:] for n in range(4)), strict=False))
    return bool(grams) and 1 - len(grams) / grams.total() > REPEATING_ABOVE


def response_health(samples: list[dict[str, Any]]) -> dict[str, float]:
    """The fractions of truncated and of repeating responses; each turn of a conversation is a response."""
    return {
        "truncated": sum(s["finish_reason"] == "length" for s in samples) / len(samples),
        "repeating": sum(is_repeating(s["response_ids"]) for s in samples) / len(samples),
    }


def degeneration_warning(step: float, text: str) -> str:
    """The warning that training gives for a sign."""
    return f"The run degenerates at step {step:.0f}: {text}."


class HealthMonitor:
    """Compares the last `COMPARED_STEPS` steps with the first."""

    def __init__(self) -> None:
        self.first: list[Mapping[str, float]] = []
        self.last: deque[Mapping[str, float]] = deque(maxlen=COMPARED_STEPS)
        self.reported: set[str] = set()

    def update(self, step: Mapping[str, float]) -> list[Sign]:
        """Take one step's log entry. Returns the signs that hold now; none before step `COMPARED_STEPS`."""
        if len(self.first) < COMPARED_STEPS:
            self.first.append(step)
        self.last.append(step)
        texts = self._compare() if len(self.last) == COMPARED_STEPS else {}
        signs = [Sign(metric, text, metric not in self.reported) for metric, text in texts.items()]
        self.reported |= texts.keys()
        return signs

    def _compare(self) -> dict[str, str]:
        """The text of each sign, by metric."""
        texts = {}
        for metric, noun in COLLAPSING_METRICS.items():
            before, now = _mean(self.first, metric), _mean(self.last, metric)
            if now < COLLAPSED_BELOW * before:
                texts[metric] = f"{noun} fell from {before:.3g} to {now:.3g}"
        repeating = _mean(self.last, "repeating")
        if repeating > max(REPEATING_ABOVE, 2 * _mean(self.first, "repeating")):
            texts["repeating"] = f"{repeating:.0%} of the responses repeat themselves"
        return texts


class WeightMonitor:
    """Finds the steps in which no token has a weight in any of a method's own losses."""

    def __init__(self) -> None:
        self.steps = self.unweighted = 0

    def update(self, step: Mapping[str, float]) -> bool:
        """Take one step's log entry. Returns whether it is the first step without any weight."""
        fractions = [value for name, value in step.items() if name.endswith(SELECTED)]
        without = bool(fractions) and not any(fractions)
        self.steps += 1
        self.unweighted += without
        return without and self.unweighted == 1

    @property
    def found_none(self) -> bool:
        """Whether no step so far has a weight."""
        return 0 < self.steps == self.unweighted

    def step_warning(self, step: int) -> str:
        """The warning of the first step without any weight."""
        text = f"At step {step} no token has a weight in any loss: the step has no gradient."
        return f"{text} {CHECK_SELECTION}" if self.found_none else text

    def run_warning(self) -> str:
        """The warning at the end of a run without any weight."""
        count = f"No step of {self.steps} has a token with a weight in any loss"
        return f"{count}: the student has learned nothing. {CHECK_SELECTION}"


def _mean(steps: Iterable[Mapping[str, float]], metric: str) -> float:
    values = [step[metric] for step in steps]
    return sum(values) / len(values)
