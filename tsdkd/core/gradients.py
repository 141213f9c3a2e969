"""Gradients at logits in closed form, a block of tokens at a time; docs/loss_without_logits.md derives them.

Tensors are (n, vocab). Functions work in place: a tensor that a docstring calls consumed holds no result afterwards,
and results go to the buffers that the caller passes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tsdkd.core.losses import Divergence, Temperature

Buffer = Tensor | None
"""Memory for a result; None: the function allocates."""


class BlockBuffers(NamedTuple):
    """Memory (n, vocab) for a block's intermediate results; all None for compiled code, which fuses most of them."""

    student_probs: Buffer = None
    student_log_probs: Buffer = None
    teacher_probs: Buffer = None
    teacher_log_probs: Buffer = None
    product: Buffer = None


def softmax(
    logits: Tensor, temperature: Temperature, probs_out: Buffer, log_probs_out: Buffer
) -> tuple[Tensor, Tensor]:
    """Softmax of `logits / temperature` and its logarithm, in float32 or better."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    divided = isinstance(temperature, Tensor) or temperature != 1
    if divided or logits.dtype != wide:
        logits = logits.to(wide, copy=True) if probs_out is None else probs_out.copy_(logits)
    if divided:
        logits /= temperature
    log_probs = torch.log_softmax(logits, -1, dtype=wide, out=log_probs_out)
    return torch.exp(log_probs, out=probs_out), log_probs


def divergence_grad(
    q: Tensor,
    log_q: Tensor,
    p: Tensor,
    log_p: Tensor,
    formula: Divergence,
    softcap_grad: Tensor | None,
    buffer: Buffer,
    grad_out: Tensor,
) -> Tensor:
    """The divergence (n,), in nats, of student q from teacher p; writes its gradient at the tempered logits before a
    soft-cap to `grad_out`. Consumes the four distributions.
    """
    if formula.mix == 0:
        divergence = dot(p, log_p.sub_(log_q), buffer)
        write_product(grad_out, q.sub_(p), softcap_grad)
        return divergence
    if formula.mix == 1:
        return softmax_backward(log_q.sub_(log_p), q, softcap_grad, buffer, grad_out)
    log_m = torch.lerp(q, p, formula.mix, out=buffer).clamp_(min=torch.finfo(q.dtype).tiny).log_()
    teacher_ratio, student_ratio = log_p.sub_(log_m), log_q.sub_(log_m)
    if formula.student_weight == 0:
        divergence = dot(p, teacher_ratio, buffer)
        softmax_backward(teacher_ratio.exp_().mul_(formula.mix - 1), q, softcap_grad, buffer, grad_out)
        return divergence
    if formula.teacher_weight == 0:
        divergence = dot(q, student_ratio, buffer)
        probs_grad = student_ratio.sub_(torch.exp(student_ratio, out=p), alpha=1 - formula.mix)
        softmax_backward(probs_grad, q, softcap_grad, buffer, grad_out)
        return divergence
    teacher_kl = formula.teacher_weight * dot(p, teacher_ratio, buffer)
    probs_grad = student_ratio.mul_(formula.student_weight)
    return teacher_kl + softmax_backward(probs_grad, q, softcap_grad, buffer, grad_out)


def softmax_backward(
    probs_grad: Tensor, q: Tensor, softcap_grad: Tensor | None, buffer: Buffer, grad_out: Tensor
) -> Tensor:
    """Write the gradient at the logits to `grad_out`, from the gradient at their softmax q, where a constant cancels.

    Returns the mean of `probs_grad` under q (n,). Consumes `probs_grad`.
    """
    mean = dot(q, probs_grad, buffer)
    write_product(grad_out, probs_grad.sub_(mean.unsqueeze(-1)), softcap_grad, q)
    return mean


def entropy_grad(q: Tensor, log_q: Tensor, entropy: Tensor) -> Tensor:
    """Gradient of H(q) at the tempered logits, `-q (log q + H)`; entropy (n,). Consumes `log_q`."""
    return torch.sub(-entropy.unsqueeze(-1), log_q, out=log_q).mul_(q)


def negative_log_prob_grad(q: Tensor, ids: Tensor) -> Tensor:
    """Gradient of -log q(y) at the tempered logits, `q - e_y`, for ids y (n,). Consumes `q`."""
    column = ids.unsqueeze(-1)
    return q.scatter_add_(-1, column, -torch.ones_like(column, dtype=q.dtype))


def write_product(out: Tensor, grad: Tensor, *factors: Tensor | None) -> None:
    """Write `grad` times the factors that are not None, rounded once to the precision of `out`. Consumes `grad`."""
    present = [factor for factor in factors if factor is not None]
    for factor in present[:-1]:
        grad.mul_(factor)
    if present:
        torch.mul(grad, present[-1], out=out)
    else:
        out.copy_(grad)


def dot(a: Tensor, b: Tensor, buffer: Buffer) -> Tensor:
    """Sum of products: (n,)."""
    return torch.mul(a, b, out=buffer).sum(-1)
