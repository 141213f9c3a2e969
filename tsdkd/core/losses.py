"""Losses of single tokens, as functions of the student's log-probabilities. It loads without torch.

`values` defines a loss for the reference and the chunked objective alike. Both differentiate it with autograd;
`loss_gradients` has closed forms for some losses.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

from tsdkd.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from tsdkd.core.teacher_signals import TeacherSignal

Temperature: TypeAlias = "float | Tensor"
"""A number, or one of each token (tokens, 1)."""
SignalName = Literal["responses", "ranks", "topk", "hidden"]
SIGNALS: tuple[SignalName, ...] = ("responses", "ranks", "topk", "hidden")
"""What is known of the teacher, from the least to the most: the tokens of the responses, the ranks of the student's
candidates, the teacher's top K, its whole distribution."""


@dataclass(frozen=True, slots=True)
class TokenBlock:
    """Some response tokens, with the student's distribution, which losses differentiate, and the teacher's."""

    log_q: Tensor
    """The student's log-probabilities (tokens, vocab), of logits divided by the temperature."""
    teacher: TeacherSignal
    temperature: Temperature = 1.0
    ids: Tensor | None = None
    """The response's tokens (tokens,)."""
    entropy: Tensor | None = None
    """The student's entropy (tokens,), where it is known already."""

    @property
    def log_p(self) -> Tensor:
        """The teacher's log-probabilities (tokens, vocab). Raises InputError for a signal without the distribution."""
        return self.teacher.vocab_log_probs(self.temperature)

    def at_ids(self, values: Tensor) -> Tensor:
        """The values at the response's tokens: (tokens, vocab) -> (tokens,). Raises InputError without `ids`."""
        if self.ids is None:
            raise InputError("The loss needs the response's tokens.", "Pass SampledTokens.")
        return values.gather(-1, self.ids.unsqueeze(-1)).squeeze(-1)


class Loss(Protocol):
    """A loss of each token. A class with this attribute and these functions is a loss of one's own."""

    @property
    def needs(self) -> SignalName:
        """The least of `SIGNALS` that it can be formed from."""

    def values(self, tokens: TokenBlock) -> Tensor:
        """The loss of each token, differentiable in `tokens.log_q`: (tokens,)."""

    def check_vocab(self, vocab: int) -> None:
        """Raise InputError for a vocabulary that is too small."""


class _AnyVocab:
    __slots__ = ()

    def check_vocab(self, vocab: int) -> None:
        """Every vocabulary fits."""


@dataclass(frozen=True, slots=True)
class Divergence(_AnyVocab):
    """`teacher_weight KL(P || M) + student_weight KL(Q || M)`, `M = mix P + (1 - mix) Q`, P the teacher, Q the student.

    Construct it by one of the three class methods: only for these are the gradients known in closed form.
    """

    mix: float
    teacher_weight: float
    student_weight: float

    @classmethod
    def jsd(cls, beta: float) -> Divergence:
        """Generalised JSD, eq. (1); KL(P || Q) at 0 and KL(Q || P) at 1, as in GKD (Agarwal et al. 2024)."""
        return cls(beta, 1.0, 0.0) if beta == 0 else cls(beta, 0.0, 1.0) if beta == 1 else cls(beta, beta, 1 - beta)

    @classmethod
    def skew_kl(cls, skew: float) -> Divergence:
        """KL(P || skew P + (1 - skew) Q) of DistiLLM (Ko et al. 2024)."""
        return cls(skew, 1.0, 0.0)

    @classmethod
    def skew_reverse_kl(cls, skew: float) -> Divergence:
        """KL(Q || (1 - skew) P + skew Q) of DistiLLM (Ko et al. 2024)."""
        return cls(1 - skew, 0.0, 1.0)

    @property
    def needs(self) -> SignalName:
        return "topk"

    def values(self, tokens: TokenBlock) -> Tensor:
        return tokens.teacher.divergence(tokens.log_q, self, tokens.temperature)


@dataclass(frozen=True, slots=True)
class TopK:
    """A divergence on the k most likely tokens of one model, chosen without gradient."""

    divergence: Divergence
    k: int
    of: Literal["student", "teacher"]
    """The model whose k most likely tokens count."""
    renormalized: Literal["both", "teacher", "neither"] = "both"
    """Whose probabilities are divided by their sum on the k tokens. If not the student's, the value is no divergence of
    two distributions and can be negative."""

    def __post_init__(self) -> None:
        if self.k < 1:
            raise InputError(f"The divergence on the top k has k = {self.k}.", "Choose 1 or more.")
        if self.renormalized != "both" and self.divergence.mix not in {0, 1}:
            raise InputError(
                "Only KL, forward or reverse, takes probabilities that do not sum to 1.", "Renormalise both."
            )

    @property
    def needs(self) -> SignalName:
        return "hidden" if self.of == "student" else "topk"

    def check_vocab(self, vocab: int) -> None:
        require_at_most(self.k, vocab)

    def values(self, tokens: TokenBlock) -> Tensor:
        from tsdkd.core.distributions import divergence_of

        if self.of == "teacher":
            ids, log_p = tokens.teacher.top(self.k, tokens.temperature)
        else:
            ids = tokens.log_q.detach().topk(self.k, -1).indices
            log_p = tokens.log_p.gather(-1, ids)
        log_q = tokens.log_q.gather(-1, ids)
        log_p = log_p if self.renormalized == "neither" else log_p.log_softmax(-1)
        log_q = log_q.log_softmax(-1) if self.renormalized == "both" else log_q
        return divergence_of(log_p, log_q, self.divergence)


@dataclass(frozen=True, slots=True)
class ToDi(_AnyVocab):
    """Token-wise divergence of ToDi (Jung et al. 2025): forward and reverse KL, mixed at each token of the vocabulary.

    `sum_v a_v p_v log(p_v/q_v) + (1 - a_v) q_v log(q_v/p_v)`, `a_v = sigmoid(beta log(p_v/q_v))` without gradient.
    At beta 1 its value is KL(P || Q) + KL(Q || P); its gradient is not.
    """

    beta: float = 1.0

    @property
    def needs(self) -> SignalName:
        return "hidden"

    def values(self, tokens: TokenBlock) -> Tensor:
        log_p, log_q = tokens.log_p, tokens.log_q
        weight = (self.beta * (log_p - log_q.detach())).sigmoid()
        return ((weight * log_p.exp() - (1 - weight) * log_q.exp()) * (log_p - log_q)).sum(-1)


@dataclass(frozen=True, slots=True)
class Ranking:
    """The indirect loss, eqs. (3)-(5): the student proposes k candidates, the teacher ranks them.

    `rest`: all other tokens together are one more candidate, with their probabilities' sum under either model. Without
    it, a common shift of the candidates' logits leaves the loss unchanged.
    """

    k: int
    rest: bool = False
    released: bool = False
    """The likelihood of the reversed ranking, as in the released code."""

    def __post_init__(self) -> None:
        if self.k < 2:
            raise InputError(f"The ranking has k = {self.k} candidates.", "Choose 2 or more.")

    @property
    def needs(self) -> SignalName:
        return "hidden" if self.rest else "ranks"

    def check_vocab(self, vocab: int) -> None:
        from tsdkd.core.ranking import check_k

        check_k(self.k, vocab)

    def values(self, tokens: TokenBlock) -> Tensor:
        from tsdkd.core.ranking import best_first, plackett_luce_nll

        candidates = tokens.teacher.ranked_candidates(tokens.log_q, self.k)
        scores = _with_rest(tokens.log_q, candidates) if self.rest else tokens.log_q.gather(-1, candidates)
        if self.rest:
            items = candidates.new_tensor(range(self.k + 1)).expand(scores.shape)
            scores = scores.gather(-1, best_first(items, _with_rest(tokens.log_p, candidates)))
        return plackett_luce_nll(scores, self.released)


@dataclass(frozen=True, slots=True)
class Entropy(_AnyVocab):
    """The student's entropy, eq. (12)."""

    @property
    def needs(self) -> SignalName:
        return "responses"

    def values(self, tokens: TokenBlock) -> Tensor:
        from tsdkd.core.distributions import entropy_of

        return entropy_of(tokens.log_q)


@dataclass(frozen=True, slots=True)
class PolicyGradient(_AnyVocab):
    """The policy gradient at the response's token y: its gradient is -grad log q(y), its value -1.

    A token's weight is its advantage A, so that the term is the mean of -A and its gradient that of -A log q(y).
    """

    @property
    def needs(self) -> SignalName:
        return "responses"

    def values(self, tokens: TokenBlock) -> Tensor:
        log_q = tokens.at_ids(tokens.log_q)
        return -(log_q - log_q.detach()).exp()


def _with_rest(log_probs: Tensor, candidates: Tensor) -> Tensor:
    """The log-probabilities of candidates (tokens, k), and of all other tokens together: (tokens, k + 1)."""
    import torch

    others = log_probs.scatter(-1, candidates, -inf).logsumexp(-1, keepdim=True)
    return torch.cat([log_probs.gather(-1, candidates), others], -1)


def require_at_most(k: int, vocab: int) -> None:
    """Raise InputError for more tokens than the vocabulary has."""
    if k > vocab:
        raise InputError(f"k is {k}, but the vocabulary has only {vocab} tokens.", "Choose a smaller k.")
