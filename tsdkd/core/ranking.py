"""Indirect distillation: the student proposes candidates, the teacher ranks them (eqs. 3-5, Algorithm 1)."""

from torch import Tensor

from tsdkd.errors import InputError


def propose(student_logits: Tensor, k: int) -> Tensor:
    """The student's k most likely tokens, best first: logits (..., vocab) -> ids (..., k).

    Raises InputError when k is not smaller than the vocabulary.
    """
    check_k(k, student_logits.shape[-1])
    return student_logits.detach().topk(k, dim=-1).indices


def check_k(k: int, vocab: int) -> None:
    """Raise InputError unless k is smaller than the vocabulary."""
    if k >= vocab:
        raise InputError(
            f"k is {k}, but the vocabulary has only {vocab} tokens.", "Choose a smaller k; the paper's is 10."
        )


def rank_candidates(candidates: Tensor, teacher_logits: Tensor) -> Tensor:
    """Candidates (..., k) in the order of teacher logits (..., vocab), best first; ties keep the student's order."""
    return best_first(candidates, teacher_logits.detach().gather(-1, candidates))


def best_first(candidates: Tensor, candidate_logits: Tensor) -> Tensor:
    """Candidates (..., k) by descending logits (..., k); ties keep their order."""
    return candidates.gather(-1, candidate_logits.argsort(dim=-1, descending=True, stable=True))


def outside_mass(candidate_log_probs: Tensor) -> Tensor:
    """The probability outside the candidates, from their log-probabilities (..., k) -> (...).

    The indirect term does not depend on it: a shift of all candidates' logits leaves eq. (4) unchanged.
    """
    return (1 - candidate_log_probs.exp().sum(-1)).clamp(min=0)


def plackett_luce_nll(scores: Tensor, released: bool = False) -> Tensor:
    """Negative log-likelihood of a ranking under Plackett-Luce, eq. (4): scores (..., k), best first -> nats (...).

    `-log prod_j exp(s_j) / sum_{l >= j} exp(s_l)`: each choice competes with the items not yet chosen (a suffix sum).
    `released`: with the items chosen before (a prefix sum), which gives the likelihood of the reversed ranking.
    """
    wide = scores if scores.dtype.itemsize >= 4 else scores.float()
    return ((_prefix_logsumexp if released else _suffix_logsumexp)(wide) - wide).sum(-1)


def plackett_luce_grad(scores: Tensor, released: bool = False) -> Tensor:
    """Gradient of `plackett_luce_nll` at its scores (..., k): `exp(s_j) sum_{i <= j} 1/R_i - 1`, R_i the suffix sums.

    `released`: R_i the prefix sums, i >= j.
    """
    forward, backward = (_prefix_logsumexp, _suffix_logsumexp) if released else (_suffix_logsumexp, _prefix_logsumexp)
    return (scores + backward(-forward(scores))).exp() - 1


def _prefix_logsumexp(scores: Tensor) -> Tensor:
    """log sum_{l <= j} exp(s_l)"""
    return scores.logcumsumexp(-1)


def _suffix_logsumexp(scores: Tensor) -> Tensor:
    """log sum_{l >= j} exp(s_l)"""
    return _prefix_logsumexp(scores.flip(-1)).flip(-1)


def ranking_nll(student_logits: Tensor, teacher_logits: Tensor, k: int) -> Tensor:
    """The indirect loss at each position, eqs. (3)-(5): logits (..., vocab) -> nats (...).

    The gradient reaches only the student's logits of its k candidates.
    Raises InputError when k is not smaller than the vocabulary.
    """
    ranked = rank_candidates(propose(student_logits, k), teacher_logits)
    return plackett_luce_nll(student_logits.gather(-1, ranked))
