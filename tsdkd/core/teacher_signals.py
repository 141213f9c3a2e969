"""Teacher signals: the interface that the objective needs, and the signals that know every token's probability.

Tensors are by response token: `tokens` runs over the response positions of a batch, row after row. `recorded_signals`
has the signals that know recorded tokens alone.
"""

from dataclasses import dataclass
from typing import Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from tsdkd.core.distributions import divergence_of, entropy_of, log_probs
from tsdkd.core.lm_head import Head, LinearOutputs
from tsdkd.core.losses import Divergence, Temperature
from tsdkd.core.ranking import best_first, outside_mass, propose, rank_candidates

ARGMAX_BLOCK = 128
"""Tokens of the vocabulary in one block of `argmax`."""


@runtime_checkable
class TeacherSignal(Protocol):
    """The teacher's distribution at some response tokens, as far as it is known.

    Results carry no gradient of the teacher. Raises InputError, with the remedy, for values that a signal cannot give.
    """

    def __len__(self) -> int:
        """Number of tokens."""

    @property
    def vocab(self) -> int | None:
        """The size of the vocabulary; None for signals that know recorded tokens alone."""

    @property
    def width(self) -> int:
        """Numbers of the teacher that `ranked_candidates` reads per candidate: the hidden size if it forms logits,
        else 1."""

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

    def top1_agreement(self, student_logits: Tensor) -> Tensor | None:
        """1 where the student's most likely token is the teacher's too, else 0: (tokens, vocab) -> (tokens,).

        None for signals that do not know the teacher's most likely token.
        """

    def ranked_candidates(self, student_logits: Tensor, k: int) -> Tensor:
        """The student's k candidates in the teacher's order, best first: (tokens, vocab) -> ids (tokens, k)."""

    def outside_mass(self, candidates: Tensor, temperature: float, log_sum: Tensor | None) -> Tensor | None:
        """The teacher's probability outside candidates (tokens, k): (tokens,).

        `log_sum`: log sum exp of all logits / temperature, (tokens,); None: it is computed. None for signals that do
        not know the candidates' probabilities.
        """

    def divergence(self, student_log_probs: Tensor, formula: Divergence, temperature: Temperature) -> Tensor:
        """The divergence from student log-probabilities (tokens, vocab): nats (tokens,)."""

    def vocab_log_probs(self, temperature: Temperature) -> Tensor:
        """Log-probabilities (tokens, vocab)."""

    def top(self, k: int, temperature: Temperature) -> tuple[Tensor, Tensor]:
        """The teacher's k most likely tokens, best first, and their log-probabilities: (tokens, k) each."""

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
        return rank_candidates(propose(student_logits, k), self.logits)

    def outside_mass(self, candidates: Tensor, temperature: float, log_sum: Tensor | None) -> Tensor:
        if log_sum is None:
            return outside_mass(log_probs(self.logits.detach(), temperature).gather(-1, candidates))
        return outside_mass(self.logits.gather(-1, candidates).to(log_sum) / temperature - log_sum.unsqueeze(-1))

    def divergence(self, student_log_probs: Tensor, formula: Divergence, temperature: Temperature) -> Tensor:
        return divergence_of(self.vocab_log_probs(temperature), student_log_probs, formula)

    def vocab_log_probs(self, temperature: Temperature) -> Tensor:
        return log_probs(self.logits.detach(), temperature)

    def top(self, k: int, temperature: Temperature) -> tuple[Tensor, Tensor]:
        ids = self.logits.topk(k, -1).indices
        return ids, self.vocab_log_probs(temperature).gather(-1, ids)

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

    def outside_mass(self, candidates: Tensor, temperature: float, log_sum: Tensor | None) -> Tensor:
        if log_sum is None:
            return self.materialized().outside_mass(candidates, temperature, None)
        logits = self.head.linear_at(self.hidden, candidates).logits()
        return outside_mass(logits.to(log_sum) / temperature - log_sum.unsqueeze(-1))

    def divergence(self, student_log_probs: Tensor, formula: Divergence, temperature: Temperature) -> Tensor:
        return self.materialized().divergence(student_log_probs, formula, temperature)

    def vocab_log_probs(self, temperature: Temperature) -> Tensor:
        return self.materialized().vocab_log_probs(temperature)

    def top(self, k: int, temperature: Temperature) -> tuple[Tensor, Tensor]:
        return self.materialized().top(k, temperature)

    def log_probs_of(self, ids: Tensor) -> Tensor:
        return self.materialized().log_probs_of(ids)


def top1_agreement(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """1 where the student's most likely token has the teacher's largest logit, else 0: (tokens, vocab) -> (tokens,)."""
    at_student_top = teacher_logits.gather(-1, argmax(student_logits).unsqueeze(-1)).squeeze(-1)
    return (at_student_top == teacher_logits.amax(-1)).float()


def argmax(logits: Tensor) -> Tensor:
    """`argmax`, the first of equals: (tokens, vocab) -> ids (tokens,).

    CPUs find a maximum many times as fast as its position, so this finds the maximum's block of the vocabulary first.
    """
    whole = logits.shape[-1] // ARGMAX_BLOCK * ARGMAX_BLOCK
    block_max = logits[:, :whole].unflatten(-1, (-1, ARGMAX_BLOCK)).amax(-1)
    if whole < logits.shape[-1]:
        block_max = torch.cat([block_max, logits[:, whole:].amax(-1, keepdim=True)], -1)
    start = block_max.max(-1, keepdim=True).indices * ARGMAX_BLOCK
    block_ids = (start + torch.arange(ARGMAX_BLOCK, device=logits.device)).clamp(max=logits.shape[-1] - 1)
    ids: Tensor = start + logits.gather(-1, block_ids).max(-1, keepdim=True).indices
    return ids.squeeze(-1)
