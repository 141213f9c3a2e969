"""Gradients at logits in closed form, a block of tokens at a time; docs/objective.md derives them.

Everything is (n, vocab) and done in place: arguments named as consumed hold nothing of use afterwards, and results go
to places that are handed in. A place of None is for compiled code, which finds its own memory.
"""

import torch
from torch import Tensor

from tsdkd.core.config import Divergence

Buffer = Tensor | None


def softmax(logits: Tensor, temperature: float, place: Buffer, log_place: Buffer) -> tuple[Tensor, Tensor]:
    """Softmax of `logits / temperature` and its logarithm, in float32 or better."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    if temperature != 1 or logits.dtype != wide:
        logits = logits.to(wide, copy=True) if place is None else place.copy_(logits)
    if temperature != 1:
        logits /= temperature
    log_p = torch.log_softmax(logits, -1, dtype=wide, out=log_place)
    return torch.exp(log_p, out=place), log_p


def divergence_grad(
    q: Tensor,
    log_q: Tensor,
    p: Tensor,
    log_p: Tensor,
    formula: Divergence,
    steepness: Tensor | None,
    place: Buffer,
    out: Tensor,
) -> Tensor:
    """A divergence (n,) of student q from teacher p; its gradient at the student's tempered logits goes to `out`.

    Consumes the four distributions. `steepness` is the soft-cap's derivative.
    """
    if formula.mix == 0:
        divergence = dot(p, log_p.sub_(log_q), place)
        write_product(out, q.sub_(p), steepness)
        return divergence
    if formula.mix == 1:
        return softmax_backward(log_q.sub_(log_p), q, steepness, place, out)
    log_m = torch.lerp(q, p, formula.mix, out=place).clamp_(min=torch.finfo(q.dtype).tiny).log_()
    teacher_ratio, student_ratio = log_p.sub_(log_m), log_q.sub_(log_m)
    if formula.student == 0:
        divergence = dot(p, teacher_ratio, place)
        softmax_backward(teacher_ratio.exp_().mul_(formula.mix - 1), q, steepness, place, out)
        return divergence
    if formula.teacher == 0:
        divergence = dot(q, student_ratio, place)
        pull = student_ratio.sub_(torch.exp(student_ratio, out=p), alpha=1 - formula.mix)
        softmax_backward(pull, q, steepness, place, out)
        return divergence
    teacher_side = formula.teacher * dot(p, teacher_ratio, place)
    return teacher_side + softmax_backward(student_ratio.mul_(formula.student), q, steepness, place, out)


def softmax_backward(pull: Tensor, q: Tensor, steepness: Tensor | None, place: Buffer, out: Tensor) -> Tensor:
    """A gradient at the probabilities q -> its mean under q (n,); the gradient at the logits goes to `out`.

    Consumes `pull`, in which a constant changes nothing.
    """
    mean = dot(q, pull, place)
    write_product(out, pull.sub_(mean.unsqueeze(-1)), steepness, q)
    return mean


def write_product(out: Tensor, slope: Tensor, *factors: Tensor | None) -> None:
    """The product of all that there are, rounded once to the precision of `out`. Consumes `slope`."""
    there = [factor for factor in factors if factor is not None]
    for factor in there[:-1]:
        slope.mul_(factor)
    if there:
        torch.mul(slope, there[-1], out=out)
    else:
        out.copy_(slope)


def dot(a: Tensor, b: Tensor, place: Buffer) -> Tensor:
    """Sum of products: (n,)."""
    return torch.mul(a, b, out=place).sum(-1)
