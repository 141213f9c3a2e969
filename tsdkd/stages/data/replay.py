"""DistiLLM's schedule (Ko et al. 2024, Sec. 3.2 and Algorithm 1): when the student answers, and what it is replayed.

One draw decides for a whole optimizer step. All randomness hangs on seed and step; `state_dict` carries the rest.
"""

import random
from collections import deque
from collections.abc import Sequence
from math import isfinite
from typing import Any, Literal

from tsdkd.stages.config.train import ReplayConfig
from tsdkd.stages.data.online import OnlineSource, ResponseSampler
from tsdkd.stages.data.randomness import random_integer, random_uniform
from tsdkd.stages.data.sources import Sample
from tsdkd.stages.models.load import LanguageModel


class ReplaySchedule:
    """How likely the student's own responses are (phi), and those that are kept."""

    def __init__(self, config: ReplayConfig) -> None:
        self.config = config
        self.phi = config.phi
        self.mark: float | None = None
        self.kept: deque[Sample] = deque(maxlen=config.replay_capacity)

    def judge(self, divergence: float) -> None:
        """A held-out divergence, nats. The first is the mark; one that is higher by the tolerance raises phi and is the
        next mark."""
        if not isfinite(divergence):
            return
        if self.mark is None:
            self.mark = divergence
        elif divergence >= self.mark + self.config.replay_tolerance:
            self.phi, self.mark = min(self.phi + self.config.phi_step, 1.0), divergence

    def choose(self, draw: float, progress: float) -> Literal["fresh", "again", "recorded"]:
        """Whose responses a step learns from: `draw` in [0, 1), `progress` the share t/T of the steps behind.

        Fresh below phi (1 - t/T), and below phi while there is room for more; again below phi.
        """
        full = len(self.kept) == self.config.replay_capacity
        if draw < self.phi * (1 - progress) or (draw < self.phi and not full):
            return "fresh"
        return "again" if draw < self.phi else "recorded"

    def state_dict(self) -> dict[str, Any]:
        return {"phi": self.phi, "mark": self.mark, "kept": list(self.kept)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.phi, self.mark = state["phi"], state["mark"]
        self.kept.extend(state["kept"])


class ReplaySource(OnlineSource):
    """Recorded responses, in whose place the schedule puts the student's own, step by step."""

    def __init__(
        self, samples: list[Sample], teacher: LanguageModel, sampler: ResponseSampler, schedule: ReplaySchedule
    ) -> None:
        super().__init__(samples, teacher, sampler, student_fraction=1.0)
        self.schedule = schedule

    def with_responses(
        self, samples: list[Sample], student: LanguageModel, key: Sequence[int], progress: float = 0.0
    ) -> list[Sample]:
        choice = self.schedule.choose(random_uniform(*key, "schedule"), progress)
        if choice == "fresh":
            samples = super().with_responses(samples, student, key)
            self.schedule.kept.extend(samples)
        if choice == "again":
            samples = random.Random(random_integer(*key, "replay")).sample(list(self.schedule.kept), len(samples))
        return samples
