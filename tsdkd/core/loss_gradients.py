"""Losses with their gradients at logits, a block of tokens at a time: in closed form, else by autograd."""

import torch
from torch import Tensor

from tsdkd.core.gradients import (
    BlockBuffers,
    divergence_grad,
    dot,
    entropy_grad,
    negative_log_prob_grad,
    softmax,
    write_product,
)
from tsdkd.core.losses import Divergence, Entropy, Loss, PolicyGradient, TokenBlock
from tsdkd.core.teacher_signals import TeacherLogits


def loss_and_grad(
    loss: Loss, tokens: TokenBlock, q: Tensor, softcap_grad: Tensor | None, buffers: BlockBuffers, grad_out: Tensor
) -> Tensor:
    """The loss of each token (n,); writes its gradient at the tempered logits before a soft-cap to `grad_out`.

    Consumes `q`, the exponential of `tokens.log_q`, and `tokens.log_q`.
    """
    if isinstance(loss, Divergence) and isinstance(tokens.teacher, TeacherLogits):
        logits = tokens.teacher.logits
        p, log_p = softmax(logits, tokens.temperature, buffers.teacher_probs, buffers.teacher_log_probs)
        return divergence_grad(q, tokens.log_q, p, log_p, loss, softcap_grad, buffers.product, grad_out)
    if isinstance(loss, Entropy):
        entropy = -dot(q, tokens.log_q, buffers.product) if tokens.entropy is None else tokens.entropy
        write_product(grad_out, entropy_grad(q, tokens.log_q, entropy), softcap_grad)
        return entropy
    if isinstance(loss, PolicyGradient) and tokens.ids is not None:
        write_product(grad_out, negative_log_prob_grad(q, tokens.ids), softcap_grad)
        return -torch.ones_like(q[:, 0])
    return differentiate(loss, tokens, q, softcap_grad, grad_out)


def differentiate(loss: Loss, tokens: TokenBlock, q: Tensor, softcap_grad: Tensor | None, grad_out: Tensor) -> Tensor:
    """`loss_and_grad` of any loss, by autograd: the gradient g at log q is `g - q sum g` at the tempered logits."""
    with torch.enable_grad():
        leaf = tokens.log_q.detach().requires_grad_()
        values = loss.values(TokenBlock(leaf, tokens.teacher, tokens.temperature, tokens.ids))
        (log_probs_grad,) = torch.autograd.grad(values.sum(), leaf)
    total = log_probs_grad.sum(-1, keepdim=True)  # autograd may give one expanded number, which cannot be written to
    write_product(grad_out, q.mul_(-total).add_(log_probs_grad), softcap_grad)
    return values.detach()
