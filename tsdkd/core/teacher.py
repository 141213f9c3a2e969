"""What the objective asks of a teacher, and the forms in which a teacher can answer.

Everything is by response token: `tokens` runs over the response positions of a batch, row after row.
`TeacherLogits` is exact, and so is `TeacherHidden`, which becomes it. `TeacherRanks` and `TeacherTopK` were recorded
earlier and know only the tokens recorded then; `TeacherTokens` knows only what the teacher answered.
"""

from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor

from tsdkd.core.config import Divergence
from tsdkd.core.distributions import divergence_of, entropy_of, log_probs
from tsdkd.core.head import Head
from tsdkd.core.ranking import best_first, propose, rank
from tsdkd.errors import InputError

STRETCH = 128
"""Tokens of the vocabulary."""


class TeacherSignal(Protocol):
    """A teacher's view of some response tokens; no answer carries a gradient on the teacher's side."""

    def __len__(self) -> int:
        """Tokens."""

    def take(self, tokens: Tensor | slice) -> Self:
        """The same signal for some of the tokens: a mask, indices or a slice."""

    def entropy(self, temperature: float) -> Tensor:
        """Nats, (tokens,)."""

    def agrees(self, student_logits: Tensor) -> Tensor:
        """Does the teacher like the student's best token best, too? Logits (tokens, vocab) -> 1 or 0, (tokens,)."""

    def ranked(self, student_logits: Tensor, k: int) -> Tensor:
        """The student's k candidates in the teacher's order, best first: ids (tokens, k)."""

    def divergence(self, student_log_probs: Tensor, formula: Divergence, temperature: float) -> Tensor:
        """From student log-probabilities (tokens, vocab): nats (tokens,)."""


@dataclass(frozen=True, slots=True)
class TeacherLogits:
    """The whole distribution: logits (tokens, vocab), live or rebuilt from hidden states."""

    logits: Tensor

    def __len__(self) -> int:
        return len(self.logits)

    def take(self, tokens: Tensor | slice) -> "TeacherLogits":
        return TeacherLogits(self.logits[tokens])

    def entropy(self, temperature: float) -> Tensor:
        with torch.no_grad():
            return entropy_of(log_probs(self.logits, temperature))

    def agrees(self, student_logits: Tensor) -> Tensor:
        chosen = self.logits.gather(-1, _best(student_logits).unsqueeze(-1)).squeeze(-1)
        return (chosen == self.logits.amax(-1)).float()

    def ranked(self, student_logits: Tensor, k: int) -> Tensor:
        return rank(propose(student_logits, k), self.logits)

    def divergence(self, student_log_probs: Tensor, formula: Divergence, temperature: float) -> Tensor:
        return divergence_of(log_probs(self.logits.detach(), temperature), student_log_probs, formula)


@dataclass(frozen=True, slots=True)
class TeacherHidden:
    """The whole distribution, not yet formed: hidden states after the last norm (tokens, width), and the head."""

    hidden: Tensor
    head: Head

    def __len__(self) -> int:
        return len(self.hidden)

    def take(self, tokens: Tensor | slice) -> "TeacherHidden":
        return TeacherHidden(self.hidden[tokens], self.head)

    def formed(self) -> TeacherLogits:
        with torch.no_grad(), torch.autocast(self.hidden.device.type, enabled=False):
            return TeacherLogits(self.head.logits(self.hidden))

    def ranked(self, student_logits: Tensor, k: int) -> Tensor:
        """As `TeacherSignal.ranked`, from the candidates' rows of the head alone."""
        candidates = propose(student_logits, k)
        with torch.no_grad():
            return best_first(candidates, self.head.logits_at(self.hidden, candidates))


@dataclass(frozen=True, slots=True)
class TeacherRanks:
    """Recorded entropies, and the teacher's ranks of the candidates that the student proposed *then*."""

    entropies: Tensor
    """(tokens,), at temperature 1"""
    candidates: Tensor
    """(tokens, recorded k), in the student's order"""
    ranks: Tensor
    """(tokens, recorded k), 0 is the teacher's favourite"""

    def __len__(self) -> int:
        return len(self.entropies)

    def take(self, tokens: Tensor | slice) -> "TeacherRanks":
        return TeacherRanks(self.entropies[tokens], self.candidates[tokens], self.ranks[tokens])

    def entropy(self, temperature: float) -> Tensor:
        if temperature != 1:
            raise InputError(
                f"Recorded entropies hold at temperature 1, not {temperature}.",
                "Score with --signal hidden, or train at temperature 1.",
            )
        return self.entropies

    def agrees(self, student_logits: Tensor) -> Tensor:
        best = self.candidates.gather(-1, self.ranks.argmin(-1, keepdim=True)).squeeze(-1)
        return (_best(student_logits) == best).float()

    def ranked(self, student_logits: Tensor, k: int) -> Tensor:
        recorded = self.candidates.shape[-1]
        if k > recorded:
            raise InputError(
                f"k is {k}, but only {recorded} candidates were recorded.",
                "Lower --k, or score again with a larger one.",
            )
        return self.candidates[..., :k].gather(-1, self.ranks[..., :k].argsort(-1))

    def divergence(self, student_log_probs: Tensor, formula: Divergence, temperature: float) -> Tensor:
        raise InputError(
            "Ranks alone carry no distribution, so the direct term cannot be formed.",
            "Train with --direct-weight 0, or score with --signal hidden or topk.",
        )


@dataclass(frozen=True, slots=True)
class TeacherTopK:
    """Recorded ranks, and the teacher's K most likely tokens with one bucket for all the others.

    Merging tokens can only lose information, so the divergence is a lower bound of the true one (data processing).
    """

    recorded: TeacherRanks
    top_ids: Tensor
    """(tokens, K), most likely first"""
    top_log_probs: Tensor
    """(tokens, K), at temperature 1"""

    def __len__(self) -> int:
        return len(self.recorded)

    def take(self, tokens: Tensor | slice) -> "TeacherTopK":
        return TeacherTopK(self.recorded.take(tokens), self.top_ids[tokens], self.top_log_probs[tokens])

    def entropy(self, temperature: float) -> Tensor:
        return self.recorded.entropy(temperature)

    def agrees(self, student_logits: Tensor) -> Tensor:
        return (_best(student_logits) == self.top_ids[..., 0]).float()

    def ranked(self, student_logits: Tensor, k: int) -> Tensor:
        return self.recorded.ranked(student_logits, k)

    def divergence(self, student_log_probs: Tensor, formula: Divergence, temperature: float) -> Tensor:
        student_top = student_log_probs.gather(-1, self.top_ids)
        return divergence_of(_with_tail(self.top_log_probs), _with_tail(student_top), formula)


@dataclass(frozen=True, slots=True)
class TeacherTokens:
    """Responses of the teacher's own, and nothing else: at each position all of its probability is on its token.

    Forward KL from it is the tokens' cross-entropy, which is sequence-level distillation (Kim and Rush 2016).
    """

    ids: Tensor
    """(tokens,)"""

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, tokens: Tensor | slice) -> "TeacherTokens":
        return TeacherTokens(self.ids[tokens])

    def entropy(self, temperature: float) -> Tensor:
        return torch.zeros(len(self), device=self.ids.device)

    def agrees(self, student_logits: Tensor) -> Tensor:
        return (_best(student_logits) == self.ids).float()

    def ranked(self, student_logits: Tensor, k: int) -> Tensor:
        raise InputError("Answers alone rank no candidates, so the ranking term cannot be formed.", "Give alpha 0.")

    def divergence(self, student_log_probs: Tensor, formula: Divergence, temperature: float) -> Tensor:
        if formula != Divergence.jsd(0):
            raise InputError("From answers alone only forward KL can be formed.", "Give beta 0.")
        return -student_log_probs.gather(-1, self.ids.unsqueeze(-1)).squeeze(-1)


def _best(logits: Tensor) -> Tensor:
    """The likeliest token, the first of equals: (tokens, vocab) -> ids (tokens,), as `argmax`.

    A maximum is found many times as fast as its place on CPUs, so its stretch of the vocabulary is found first.
    """
    whole = logits.shape[-1] // STRETCH * STRETCH
    peaks = logits[:, :whole].unflatten(-1, (-1, STRETCH)).amax(-1)
    if whole < logits.shape[-1]:
        peaks = torch.cat([peaks, logits[:, whole:].amax(-1, keepdim=True)], -1)
    first = peaks.max(-1, keepdim=True).indices * STRETCH
    stretch = (first + torch.arange(STRETCH, device=logits.device)).clamp(max=logits.shape[-1] - 1)
    place: Tensor = first + logits.gather(-1, stretch).max(-1, keepdim=True).indices
    return place.squeeze(-1)


def _with_tail(top_log_probs: Tensor) -> Tensor:
    captured = top_log_probs.exp().sum(-1, keepdim=True).clamp(max=1 - 1e-6)  # the tail never has probability 0
    return torch.cat([top_log_probs, torch.log1p(-captured)], -1)
