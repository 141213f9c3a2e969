"""DistiLLM's adaptive off-policy training (Ko et al. 2024, Sec. 3.2 and Algorithm 1): recorded, sampled or replayed.

One random draw per optimizer step decides which responses the step trains on.
"""

import random
from collections import deque
from collections.abc import Sequence
from math import isfinite
from typing import Any, Literal

from tsdkd.stages.config.train import ReplayConfig
from tsdkd.stages.data.online import OnlineSource, ResponseSampler
from tsdkd.stages.data.online_teachers import OnlineTeacher
from tsdkd.stages.data.randomness import random_integer, random_uniform
from tsdkd.stages.data.source import Sample
from tsdkd.stages.models.language_model import LanguageModel


class ReplaySchedule:
    """The probability phi of the student's responses, and the replay buffer of those that it sampled."""

    def __init__(self, config: ReplayConfig) -> None:
        self.config = config
        self.phi = config.phi
        self.reference: float | None = None
        """The held-out divergence, in nats, that later divergences are compared with."""
        self.replay_buffer: deque[Sample] = deque(maxlen=config.replay_capacity)

    def update(self, divergence: float) -> None:
        """Increases phi if a held-out divergence, in nats, reaches the threshold: the reference plus the tolerance.

        The first divergence is the reference, and then each one that reaches the threshold. Divergences that are not
        finite are ignored.
        """
        if not isfinite(divergence):
            return
        if self.reference is None:
            self.reference = divergence
        elif divergence >= self.reference + self.config.replay_tolerance:
            self.phi = min(self.phi + self.config.phi_step, 1.0)
            self.reference = divergence

    def choose_responses(self, draw: float, progress: float) -> Literal["sampled", "replayed", "recorded"]:
        """The responses of a step. `draw` in [0, 1); `progress`: the fraction t/T of steps that are done.

        A draw below phi gives the student's responses: sampled below phi (1 - t/T) or while the replay buffer is not
        full, else replayed. Other draws give recorded responses.
        """
        full = len(self.replay_buffer) == self.config.replay_capacity
        if draw < self.phi * (1 - progress) or (draw < self.phi and not full):
            return "sampled"
        return "replayed" if draw < self.phi else "recorded"

    def state_dict(self) -> dict[str, Any]:
        return {"phi": self.phi, "reference": self.reference, "replay_buffer": list(self.replay_buffer)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.phi, self.reference = state["phi"], state["reference"]
        self.replay_buffer.extend(state["replay_buffer"])


class ReplaySource(OnlineSource):
    """Recorded samples; the schedule replaces their responses by sampled ones, or the samples by replayed ones."""

    def __init__(
        self,
        samples: list[Sample],
        teacher: OnlineTeacher,
        sampler: ResponseSampler,
        schedule: ReplaySchedule,
    ) -> None:
        super().__init__(samples, teacher, sampler, student_fraction=1.0)
        self.schedule = schedule

    def with_responses(
        self, samples: list[Sample], student: LanguageModel, key: Sequence[int], progress: float = 0.0
    ) -> list[Sample]:
        choice = self.schedule.choose_responses(random_uniform(*key, "schedule"), progress)
        if choice == "sampled":
            samples = super().with_responses(samples, student, key)
            self.schedule.replay_buffer.extend(samples)
        elif choice == "replayed":
            generator = random.Random(random_integer(*key, "replay"))
            samples = generator.sample(list(self.schedule.replay_buffer), len(samples))
        return samples
