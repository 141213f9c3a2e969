"""The signal of tokens that have different teachers of one vocabulary, each with its own width and head."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tsdkd.core.lm_head import LinearOutputs
from tsdkd.core.losses import Divergence, Temperature
from tsdkd.core.teacher_signals import TeacherHidden, TeacherLogits


@dataclass(frozen=True, slots=True)
class SeveralTeachers:
    """The whole distribution of each token's own teacher."""

    teachers: tuple[TeacherHidden, ...]
    owners: Tensor
    """The index of each token's teacher (tokens,)."""
    rows: Tensor
    """The row of each token among its teacher's hidden states (tokens,)."""

    @classmethod
    def of(cls, teachers: Sequence[TeacherHidden], owners: Tensor) -> "SeveralTeachers":
        """`owners` (tokens,); the hidden states of a teacher are those of its tokens, in their order."""
        rows = torch.zeros_like(owners)
        for i, teacher in enumerate(teachers):
            rows[owners == i] = torch.arange(len(teacher), device=owners.device)
        return cls(tuple(teachers), owners, rows)

    def __len__(self) -> int:
        return len(self.owners)

    @property
    def vocab(self) -> int:
        return self.teachers[0].vocab

    @property
    def width(self) -> int:
        return max(teacher.width for teacher in self.teachers)

    def take(self, tokens: Tensor | slice) -> "SeveralTeachers":
        return replace(self, owners=self.owners[tokens], rows=self.rows[tokens])

    def materialized(self) -> TeacherLogits:
        return TeacherLogits(self._gather(lambda teacher, _: teacher.materialized().logits))

    def linear_outputs(self, buffer: Tensor | None) -> LinearOutputs:
        logits = self.materialized().logits  # heads differ in scale and soft-cap
        return LinearOutputs(logits if buffer is None else buffer[: len(self)].copy_(logits))

    def entropy(self, temperature: float) -> Tensor:
        return self.materialized().entropy(temperature)

    def top1_agreement(self, student_logits: Tensor) -> Tensor:
        return self.materialized().top1_agreement(student_logits)

    def ranked_candidates(self, student_logits: Tensor, k: int) -> Tensor:
        return self._gather(lambda teacher, tokens: teacher.ranked_candidates(student_logits[tokens], k))

    def outside_mass(self, candidates: Tensor, temperature: float, log_sum: Tensor | None) -> Tensor:
        return self._gather(
            lambda teacher, tokens: teacher.outside_mass(
                candidates[tokens], temperature, None if log_sum is None else log_sum[tokens]
            )
        )

    def divergence(self, student_log_probs: Tensor, formula: Divergence, temperature: Temperature) -> Tensor:
        return self.materialized().divergence(student_log_probs, formula, temperature)

    def vocab_log_probs(self, temperature: Temperature) -> Tensor:
        return self.materialized().vocab_log_probs(temperature)

    def top(self, k: int, temperature: Temperature) -> tuple[Tensor, Tensor]:
        return self.materialized().top(k, temperature)

    def log_probs_of(self, ids: Tensor) -> Tensor:
        return self.materialized().log_probs_of(ids)

    def _gather(self, values_of: Callable[[TeacherHidden, Tensor], Tensor]) -> Tensor:
        """The values (tokens, ...) that each teacher gives for its own tokens, in the order of the tokens."""
        tokens = [(self.owners == i).nonzero().squeeze(-1) for i in range(len(self.teachers))]
        values = [
            values_of(teacher.take(self.rows[own]), own) for teacher, own in zip(self.teachers, tokens, strict=True)
        ]
        return torch.cat(values)[torch.cat(tokens).argsort()]
