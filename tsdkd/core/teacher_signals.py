"""Teacher signals: the forms in which the teacher's distribution is known, and what the objective asks of each.

Tensors are by response token: `tokens` runs over the response positions of a batch, row after row.
`TeacherLogits` and `TeacherHidden` know the probability of every token of the vocabulary. `TeacherRanks` and
`TeacherTopK` know the tokens that were recorded; `TeacherTokens` knows only the teacher's responses. A signal raises
InputError for what it does not know.
"""

from dataclasses import dataclass
from typing import NoReturn, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from tsdkd.core.config import Divergence
from tsdkd.core.distributions import divergence_of, entropy_of, log_probs
from tsdkd.core.head import Head, LinearOutputs
from tsdkd.core.ranking import best_first, propose, rank
from tsdkd.errors import InputError

VOCAB_BLOCK = 128
"""Tokens of the vocabulary among which `_argmax` looks for a maximum's position."""


@runtime_checkable
class TeacherSignal(Protocol):
    """The teacher's distribution at some response tokens, as far as it is known; results carry no teacher gradient."""

    def __len__(self) -> int:
        """Number of tokens."""

    @property
    def vocab(self) -> int | None:
        """The vocabulary of which every token's probability is known; None where only recorded tokens are known."""

    @property
    def width(self) -> int:
        """Numbers that `ranked_candidates` reads for each candidate beside the student's: the teacher's hidden size
        where it forms candidates' logits, else 1."""

    def take(self, tokens: Tensor | slice) -> Self:
        """The same signal for some of the tokens: a mask, indices or a slice."""

    def materialized(self) -> "TeacherSignal":
        """The same signal with its logits formed, so that several calls do not form them again."""

    def linear_outputs(self, buffer: Tensor | None) -> LinearOutputs:
        """The head's linear outputs (tokens, vocab), for signals with a `vocab`.

        `buffer`: the values of an earlier call for at least as many tokens, whose memory may be used again.
        """

    def entropy(self, temperature: float) -> Tensor:
        """Nats, (tokens,)."""

    def top1_agreement(self, student_logits: Tensor) -> Tensor:
        """1 where the student's most likely token is the teacher's too, else 0: (tokens, vocab) -> (tokens,)."""

    def ranked_candidates(self, student_logits: Tensor, k: int) -> Tensor:
        """The student's k candidates in the teacher's order, best first: (tokens, vocab) -> ids (tokens, k)."""

    def divergence(self, student_log_probs: Tensor, formula: Divergence, temperature: float) -> Tensor:
        """The divergence from student log-probabilities (tokens, vocab): nats (tokens,)."""

    def log_probs_of(self, ids: Tensor) -> Tensor:
        """Log-probabilities of ids (tokens,) at temperature 1, one at each token: (tokens,)."""


@dataclass(frozen=True, slots=True)
class TeacherLogits:
    """The whole distribution as logits (tokens, vocab)."""

    logits: Tensor

    def __len__(self) -> int:
        return len(self.logits)

    @property
    def vocab(self) -> int:
        return self.logits.shape[-1]

    @property
    def width(self) -> int:
        return 1

    def take(self, tokens: Tensor | slice) -> "TeacherLogits":
        return TeacherLogits(self.logits[tokens])

    def materialized(self) -> "TeacherLogits":
        return self

    def linear_outputs(self, buffer: Tensor | None) -> LinearOutputs:
        return LinearOutputs(self.logits)

    def entropy(self, temperature: float) -> Tensor:
        with torch.no_grad():
            return entropy_of(log_probs(self.logits, temperature))

    def top1_agreement(self, student_logits: Tensor) -> Tensor:
        return top1_agreement(student_logits, self.logits)

    def ranked_candidates(self, student_logits: Tensor, k: int) -> Tensor:
        return rank(propose(student_logits, k), self.logits)

    def divergence(self, student_log_probs: Tensor, formula: Divergence, temperature: float) -> Tensor:
        return divergence_of(log_probs(self.logits.detach(), temperature), student_log_probs, formula)

    def log_probs_of(self, ids: Tensor) -> Tensor:
        return log_probs(self.logits.detach()).gather(-1, ids.unsqueeze(-1)).squeeze(-1)


@dataclass(frozen=True, slots=True)
class TeacherHidden:
    """The whole distribution as hidden states after the last norm (tokens, width) and the head.

    Every call but `ranked_candidates` forms all logits; call `materialized` before several of them.
    """

    hidden: Tensor
    head: Head

    def __len__(self) -> int:
        return len(self.hidden)

    @property
    def vocab(self) -> int:
        return self.head.vocab

    @property
    def width(self) -> int:
        return self.hidden.shape[-1]

    def take(self, tokens: Tensor | slice) -> "TeacherHidden":
        return TeacherHidden(self.hidden[tokens], self.head)

    def materialized(self) -> TeacherLogits:
        with torch.no_grad(), torch.autocast(self.hidden.device.type, enabled=False):
            return TeacherLogits(self.head.logits(self.hidden))

    def linear_outputs(self, buffer: Tensor | None) -> LinearOutputs:
        return self.head.linear(self.hidden, out=None if buffer is None else buffer[: len(self)])

    def entropy(self, temperature: float) -> Tensor:
        return self.materialized().entropy(temperature)

    def top1_agreement(self, student_logits: Tensor) -> Tensor:
        return self.materialized().top1_agreement(student_logits)

    def ranked_candidates(self, student_logits: Tensor, k: int) -> Tensor:
        candidates = propose(student_logits, k)
        with torch.no_grad():
            return best_first(candidates, self.head.logits_at(self.hidden, candidates))

    def divergence(self, student_log_probs: Tensor, formula: Divergence, temperature: float) -> Tensor:
        return self.materialized().divergence(student_log_probs, formula, temperature)

    def log_probs_of(self, ids: Tensor) -> Tensor:
        return self.materialized().log_probs_of(ids)


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

    def log_probs_of(self, ids: Tensor) -> NoReturn:
        raise InputError(
            "The policy gradient needs the teacher's probability of every token, which was not recorded.",
            "Score with --signal hidden.",
        )


@dataclass(frozen=True, slots=True)
class TeacherRanks(RecordedSignal):
    """Recorded entropies, and the teacher's ranks of the candidates that the student proposed when it was scored."""

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

    def top1_agreement(self, student_logits: Tensor) -> Tensor:
        favourite = self.candidates.gather(-1, self.ranks.argmin(-1, keepdim=True)).squeeze(-1)
        return (_argmax(student_logits) == favourite).float()

    def ranked_candidates(self, student_logits: Tensor, k: int) -> Tensor:
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
class TeacherTopK(RecordedSignal):
    """Recorded ranks, and the teacher's K most likely tokens with one bucket for all other tokens.

    Merging tokens loses information, so the divergence is a lower bound of the true one (data processing inequality).
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

    def top1_agreement(self, student_logits: Tensor) -> Tensor:
        return (_argmax(student_logits) == self.top_ids[..., 0]).float()

    def ranked_candidates(self, student_logits: Tensor, k: int) -> Tensor:
        return self.recorded.ranked_candidates(student_logits, k)

    def divergence(self, student_log_probs: Tensor, formula: Divergence, temperature: float) -> Tensor:
        student_top = student_log_probs.gather(-1, self.top_ids)
        return divergence_of(_with_tail(self.top_log_probs), _with_tail(student_top), formula)


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

    def entropy(self, temperature: float) -> Tensor:
        return torch.zeros(len(self), device=self.ids.device)

    def top1_agreement(self, student_logits: Tensor) -> Tensor:
        return (_argmax(student_logits) == self.ids).float()

    def ranked_candidates(self, student_logits: Tensor, k: int) -> Tensor:
        raise InputError("Responses alone rank no candidates, so the indirect term cannot be formed.", "Give alpha 0.")

    def divergence(self, student_log_probs: Tensor, formula: Divergence, temperature: float) -> Tensor:
        if formula != Divergence.jsd(0):
            raise InputError("From responses alone only forward KL can be formed.", "Give beta 0.")
        return -student_log_probs.gather(-1, self.ids.unsqueeze(-1)).squeeze(-1)


def top1_agreement(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """1 where the student's most likely token has the teacher's largest logit, else 0: (tokens, vocab) -> (tokens,)."""
    at_student_top = teacher_logits.gather(-1, _argmax(student_logits).unsqueeze(-1)).squeeze(-1)
    return (at_student_top == teacher_logits.amax(-1)).float()


def _argmax(logits: Tensor) -> Tensor:
    """`argmax`, the first of equals: (tokens, vocab) -> ids (tokens,).

    CPUs find a maximum many times as fast as its position, so this finds the maximum's block of the vocabulary first.
    """
    whole = logits.shape[-1] // VOCAB_BLOCK * VOCAB_BLOCK
    block_max = logits[:, :whole].unflatten(-1, (-1, VOCAB_BLOCK)).amax(-1)
    if whole < logits.shape[-1]:
        block_max = torch.cat([block_max, logits[:, whole:].amax(-1, keepdim=True)], -1)
    start = block_max.max(-1, keepdim=True).indices * VOCAB_BLOCK
    block_ids = (start + torch.arange(VOCAB_BLOCK, device=logits.device)).clamp(max=logits.shape[-1] - 1)
    ids: Tensor = start + logits.gather(-1, block_ids).max(-1, keepdim=True).indices
    return ids.squeeze(-1)


def _with_tail(top_log_probs: Tensor) -> Tensor:
    captured = top_log_probs.exp().sum(-1, keepdim=True).clamp(max=1 - 1e-6)  # the tail never has probability 0
    return torch.cat([top_log_probs, torch.log1p(-captured)], -1)
