"""Indirect distillation: the student proposes tokens, the teacher ranks them (eqs. 3-5, Algorithm 1)."""

from torch import Tensor

from tsdkd.errors import InputError


def propose(student_logits: Tensor, k: int) -> Tensor:
    """The student's own k best tokens, best first: logits (..., vocab) -> ids (..., k).

    Raises InputError when k is not smaller than the vocabulary.
    """
    require_candidates(k, student_logits.shape[-1])
    return student_logits.detach().topk(k, dim=-1).indices


def require_candidates(k: int, vocab: int) -> None:
    """Raise InputError unless k is smaller than the vocabulary."""
    if k >= vocab:
        raise InputError(
            f"k is {k}, but the vocabulary has only {vocab} tokens.", "Choose a smaller k; the paper's is 10."
        )


def rank(candidates: Tensor, teacher_logits: Tensor) -> Tensor:
    """Candidates (..., k) in the teacher's order, best first; equal logits keep the student's order."""
    return best_first(candidates, teacher_logits.detach().gather(-1, candidates))


def best_first(candidates: Tensor, liking: Tensor) -> Tensor:
    """Candidates (..., k) by descending liking (..., k); equals keep their order."""
    return candidates.gather(-1, liking.argsort(dim=-1, descending=True, stable=True))


def plackett_luce_nll(scores: Tensor, released: bool = False) -> Tensor:
    """Negative log-likelihood of a ranking under Plackett-Luce, eq. (4): scores (..., k), best first -> nats (...).

    `-log prod_j exp(s_j) / sum_{l >= j} exp(s_l)`: each choice competes with the items not yet chosen (a suffix sum).
    `released`: with those chosen before (a prefix sum), which is the likelihood of the reversed ranking.
    """
    wide = scores if scores.dtype.itemsize >= 4 else scores.float()
    return ((_prefix if released else _suffix)(wide) - wide).sum(-1)


def plackett_luce_grad(scores: Tensor, released: bool = False) -> Tensor:
    """Gradient of `plackett_luce_nll` at its scores (..., k): how often an item was to be chosen, less once."""
    competing, met = (_prefix, _suffix) if released else (_suffix, _prefix)
    return (scores + met(-competing(scores))).exp() - 1


def _prefix(scores: Tensor) -> Tensor:
    """log sum_{l <= j} exp(s_l)"""
    return scores.logcumsumexp(-1)


def _suffix(scores: Tensor) -> Tensor:
    """log sum_{l >= j} exp(s_l)"""
    return _prefix(scores.flip(-1)).flip(-1)


def ranking_nll(student_logits: Tensor, teacher_logits: Tensor, k: int) -> Tensor:
    """The per-position indirect loss, eqs. (3)-(5): logits (..., vocab) -> nats (...).

    The gradient reaches only the student's k proposed logits. Raises InputError when k is not below the vocabulary.
    """
    ranked = rank(propose(student_logits, k), teacher_logits)
    return plackett_luce_nll(student_logits.gather(-1, ranked))
