"""Signs that a run degenerates: responses that repeat themselves, entropy or length that collapses. Knows no torch."""

from __future__ import annotations

from collections import Counter, deque
from typing import Any

WINDOW = 5
"""Steps that are averaged before a run is judged, at its beginning and now."""
FLOOR = 0.2
"""Of the value at the beginning: entropy or length below it has collapsed."""
REPEATED = 0.5
"""Share of a response's 4-grams that occurred before: above it the response repeats itself."""

COLLAPSES = {"student_entropy": "the student's entropy", "response_length": "the length of its responses"}


def is_repeating(ids: list[int]) -> bool:
    grams = Counter(zip(*(ids[n:] for n in range(4)), strict=False))
    return bool(grams) and 1 - len(grams) / grams.total() > REPEATED


def response_health(samples: list[dict[str, Any]]) -> dict[str, float]:
    """Shares of truncated and of repeating responses."""
    return {
        "truncated": sum(s["finish_reason"] == "length" for s in samples) / len(samples),
        "repeating": sum(is_repeating(s["response_ids"]) for s in samples) / len(samples),
    }


def degeneration_warning(step: float, sign: str) -> str:
    """What is warned of while training."""
    return f"The run degenerates at step {step:.0f}: {sign}."


class HealthMonitor:
    """Compares the last `WINDOW` steps with the first."""

    def __init__(self) -> None:
        self.first: list[dict[str, float]] = []
        self.last: deque[dict[str, float]] = deque(maxlen=WINDOW)

    def see(self, step: dict[str, float]) -> dict[str, str]:
        """One step's log -> the measures that are wrong by now, and how; nothing in the first `WINDOW` steps."""
        if len(self.first) < WINDOW:
            self.first.append(step)
        self.last.append(step)
        if len(self.last) < WINDOW:
            return {}
        signs = {}
        for name, words in COLLAPSES.items():
            before, now = self._mean(self.first, name), self._mean(self.last, name)
            if now < FLOOR * before:
                signs[name] = f"{words} fell from {before:.3g} to {now:.3g}"
        share = self._mean(self.last, "repeating")
        if share > max(REPEATED, 2 * self._mean(self.first, "repeating")):
            signs["repeating"] = f"{share:.0%} of the responses repeat themselves"
        return signs

    @staticmethod
    def _mean(steps: list[dict[str, float]] | deque[dict[str, float]], name: str) -> float:
        return sum(step[name] for step in steps) / len(steps)
