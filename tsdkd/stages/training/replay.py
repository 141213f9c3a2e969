"""DistiLLM's schedule (Ko et al. 2024, Sec. 3.2 and Algorithm 1): when the student answers, and what it is replayed.

One draw decides for a whole optimizer step. All randomness hangs on seed and step; `state_dict` carries the rest.
"""

import random
from collections import deque
from collections.abc import Sequence
from math import isfinite
from typing import Any, Literal

from tsdkd.stages.config import ReplayConfig
from tsdkd.stages.models import LanguageModel
from tsdkd.stages.samples.sources import Sample
from tsdkd.stages.training.live import LiveSamples, Speaker, number


class Schedule:
    """How likely the student's own responses are (phi), and those that are kept."""

    def __init__(self, config: ReplayConfig) -> None:
        self.config = config
        self.phi = config.phi
        self.mark: float | None = None
        self.kept: deque[Sample] = deque(maxlen=config.capacity)

    def judge(self, divergence: float) -> None:
        """A held-out divergence, nats. The first is the mark; one that is higher by the tolerance raises phi and is the
        next mark."""
        if not isfinite(divergence):
            return
        if self.mark is None:
            self.mark = divergence
        elif divergence >= self.mark + self.config.tolerance:
            self.phi, self.mark = min(self.phi + self.config.phi_rise, 1.0), divergence

    def choose(self, draw: float, progress: float) -> Literal["fresh", "again", "recorded"]:
        """Whose responses a step learns from: `draw` in [0, 1), `progress` the share t/T of the steps behind.

        Fresh below phi (1 - t/T), and below phi while there is room for more; again below phi.
        """
        full = len(self.kept) == self.config.capacity
        if draw < self.phi * (1 - progress) or (draw < self.phi and not full):
            return "fresh"
        return "again" if draw < self.phi else "recorded"

    def state_dict(self) -> dict[str, Any]:
        return {"phi": self.phi, "mark": self.mark, "kept": list(self.kept)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.phi, self.mark = state["phi"], state["mark"]
        self.kept.extend(state["kept"])


class ReplayedSamples(LiveSamples):
    """Recorded responses, in whose place the schedule puts the student's own, step by step."""

    def __init__(self, samples: list[Sample], teacher: LanguageModel, speaker: Speaker, schedule: Schedule) -> None:
        super().__init__(samples, teacher, speaker, on_policy=1.0)
        self.schedule = schedule

    def answered(
        self, samples: list[Sample], student: LanguageModel, key: Sequence[int], progress: float = 0.0
    ) -> list[Sample]:
        choice = self.schedule.choose(number(*key, "schedule") / 2**60, progress)
        if choice == "fresh":
            samples = super().answered(samples, student, key)
            self.schedule.kept.extend(samples)
        if choice == "again":
            samples = random.Random(number(*key, "replay")).sample(list(self.schedule.kept), len(samples))
        return samples
