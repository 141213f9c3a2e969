"""Teacher signals that know recorded tokens alone: the student's candidates, the teacher's top K, the responses."""

from dataclasses import dataclass
from typing import NoReturn, Self

import torch
from torch import Tensor

from tsdkd.core.distributions import divergence_of
from tsdkd.core.losses import Divergence, Temperature
from tsdkd.core.ranking import best_first, propose
from tsdkd.core.teacher_signals import argmax
from tsdkd.errors import InputError


class RecordedSignal:
    """Base of the signals that know recorded tokens alone."""

    __slots__ = ()

    @property
    def vocab(self) -> None:
        return None

    @property
    def width(self) -> int:
        return 1

    def materialized(self) -> Self:
        return self

    def linear_outputs(self, buffer: Tensor | None) -> NoReturn:
        raise InputError("The teacher's logits were not recorded.", "Score with --signal hidden.")

    def outside_mass(self, candidates: Tensor, temperature: float, log_sum: Tensor | None) -> None:
        return None  # a recorded top K need not contain the candidates

    def log_probs_of(self, ids: Tensor) -> NoReturn:
        raise _not_recorded("The policy gradient")

    def vocab_log_probs(self, temperature: Temperature) -> NoReturn:
        raise _not_recorded("A loss or a feature")

    def top(self, k: int, temperature: Temperature) -> tuple[Tensor, Tensor]:
        raise _not_recorded("A loss or a feature")


@dataclass(frozen=True, slots=True)
class TeacherRanks(RecordedSignal):
    """Recorded entropies, and the teacher's ranks of the candidates that the student proposed when it was scored."""

    entropies: Tensor
    """(tokens,), at temperature 1"""
    candidates: Tensor
    """(tokens, recorded k), in the student's order"""
    ranks: Tensor
    """(tokens, recorded k), 0 is the teacher's most likely candidate"""

    def __len__(self) -> int:
        return len(self.entropies)

    def take(self, tokens: Tensor | slice) -> "TeacherRanks":
        return TeacherRanks(self.entropies[tokens], self.candidates[tokens], self.ranks[tokens])

    def entropy(self, temperature: Temperature) -> Tensor:
        return _at_temperature_1(self.entropies, temperature)

    def top1_agreement(self, student_logits: Tensor) -> None:
        return None  # the teacher's most likely token need not be among the candidates

    def ranked_candidates(self, student_logits: Tensor, k: int) -> Tensor:
        recorded = self.candidates.shape[-1]
        if k > recorded:
            raise InputError(
                f"k is {k}, but only {recorded} candidates were recorded.",
                "Lower --k, or score again with a larger one.",
            )
        return self.candidates[..., :k].gather(-1, self.ranks[..., :k].argsort(-1))

    def divergence(self, student_log_probs: Tensor, formula: Divergence, temperature: Temperature) -> Tensor:
        raise InputError(
            "Ranks alone carry no distribution, so the direct term cannot be formed.",
            "Train with --direct-weight 0, or score with --signal hidden or topk.",
        )


@dataclass(frozen=True, slots=True)
class TopKRanks:
    """Entropies, and the order that the teacher's K most likely tokens give to any candidates.

    Candidates outside the K come last, in the student's order: they are tied, and the student's order is the one whose
    Plackett-Luce likelihood it finds greatest.
    """

    entropies: Tensor
    """(tokens,), at temperature 1"""
    top_ids: Tensor
    """(tokens, K)"""
    top_log_probs: Tensor
    """(tokens, K), at temperature 1"""

    def __len__(self) -> int:
        return len(self.entropies)

    def take(self, tokens: Tensor | slice) -> "TopKRanks":
        return TopKRanks(self.entropies[tokens], self.top_ids[tokens], self.top_log_probs[tokens])

    def entropy(self, temperature: Temperature) -> Tensor:
        return _at_temperature_1(self.entropies, temperature)

    def ranked_candidates(self, student_logits: Tensor, k: int) -> Tensor:
        candidates = propose(student_logits, k)
        found = candidates.unsqueeze(-1) == self.top_ids.unsqueeze(-2)
        known = self.top_log_probs.unsqueeze(-2).where(found, -torch.inf).amax(-1)
        return best_first(candidates, known)


@dataclass(frozen=True, slots=True)
class TeacherTopK(RecordedSignal):
    """Ranks, and the teacher's K most likely tokens with one bucket for all other tokens.

    Merging tokens loses information, so the divergence is a lower bound of the true one (data processing inequality).
    """

    recorded: TeacherRanks | TopKRanks
    top_ids: Tensor
    """(tokens, K), most likely first"""
    top_log_probs: Tensor
    """(tokens, K), at temperature 1"""

    def __len__(self) -> int:
        return len(self.recorded)

    def take(self, tokens: Tensor | slice) -> "TeacherTopK":
        return TeacherTopK(self.recorded.take(tokens), self.top_ids[tokens], self.top_log_probs[tokens])

    def entropy(self, temperature: Temperature) -> Tensor:
        return self.recorded.entropy(temperature)

    def top1_agreement(self, student_logits: Tensor) -> Tensor:
        return (argmax(student_logits) == self.top_ids[..., 0]).float()

    def ranked_candidates(self, student_logits: Tensor, k: int) -> Tensor:
        return self.recorded.ranked_candidates(student_logits, k)

    def divergence(self, student_log_probs: Tensor, formula: Divergence, temperature: Temperature) -> Tensor:
        _require_temperature_1(temperature)
        student_top = student_log_probs.gather(-1, self.top_ids)
        return divergence_of(_with_tail(self.top_log_probs), _with_tail(student_top), formula)

    def top(self, k: int, temperature: Temperature) -> tuple[Tensor, Tensor]:
        _require_temperature_1(temperature)
        if k > self.top_ids.shape[-1]:
            raise InputError(
                f"k is {k}, but only the teacher's {self.top_ids.shape[-1]} most likely tokens are known.",
                "Lower k, or score again with a larger --top-k.",
            )
        return self.top_ids[:, :k], self.top_log_probs[:, :k]


@dataclass(frozen=True, slots=True)
class TeacherTokens(RecordedSignal):
    """Tokens of the teacher's responses; at each position its probability counts as all on this token.

    Forward KL is then the tokens' cross-entropy, which is sequence-level distillation (Kim and Rush 2016).
    """

    ids: Tensor
    """(tokens,)"""

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, tokens: Tensor | slice) -> "TeacherTokens":
        return TeacherTokens(self.ids[tokens])

    def entropy(self, temperature: Temperature) -> Tensor:
        return torch.zeros(len(self), device=self.ids.device)

    def top1_agreement(self, student_logits: Tensor) -> None:
        return None  # a sampled token need not be the teacher's most likely one

    def ranked_candidates(self, student_logits: Tensor, k: int) -> Tensor:
        raise InputError("Responses alone rank no candidates, so the indirect term cannot be formed.", "Give alpha 0.")

    def divergence(self, student_log_probs: Tensor, formula: Divergence, temperature: Temperature) -> Tensor:
        if formula != Divergence.jsd(0):
            raise InputError("From responses alone only forward KL can be formed.", "Give beta 0.")
        return -student_log_probs.gather(-1, self.ids.unsqueeze(-1)).squeeze(-1)


def _at_temperature_1(entropies: Tensor, temperature: Temperature) -> Tensor:
    _require_temperature_1(temperature)
    return entropies


def _require_temperature_1(temperature: Temperature) -> None:
    if isinstance(temperature, Tensor) or temperature != 1:
        named = "one of each token" if isinstance(temperature, Tensor) else str(temperature)
        raise InputError(
            f"Recorded entropies and probabilities hold at temperature 1, not {named}.",
            "Score with --signal hidden, or train at temperature 1.",
        )


def _not_recorded(reader: str) -> InputError:
    return InputError(
        f"{reader} needs the teacher's probability of every token, which was not recorded.",
        "Score with --signal hidden.",
    )


def _with_tail(top_log_probs: Tensor) -> Tensor:
    captured = top_log_probs.exp().sum(-1, keepdim=True).clamp(max=1 - 1e-6)  # the tail never has probability 0
    return torch.cat([top_log_probs, torch.log1p(-captured)], -1)
