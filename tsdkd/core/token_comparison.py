"""Compares student and teacher token by token: the values that a token's two distributions determine."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from tsdkd.core.gradients import BlockBuffers, divergence_grad, dot, softmax
from tsdkd.core.lm_head import LinearOutputs
from tsdkd.core.loss_gradients import differentiate
from tsdkd.core.losses import Divergence, TokenBlock
from tsdkd.core.policy_gradient import SampledTokens, importance_and_rewards
from tsdkd.core.teacher_signals import TeacherSignal, top1_agreement


class Comparison(NamedTuple):
    """How both models are compared at every token."""

    formula: Divergence | None
    """The divergence that is formed with its gradient; None: none is."""
    temperature: float


class TokenValues(NamedTuple):
    """Values of each response token, (tokens,)."""

    student_entropy: Tensor
    teacher_entropy: Tensor
    top1_agreement: Tensor | None
    """None for a signal that does not know the teacher's most likely token."""
    divergence: Tensor
    """0 without a formula."""
    importance: Tensor
    """1 without a policy gradient."""
    reward: Tensor
    """0 without a policy gradient."""
    student_log_sum: Tensor
    """log sum exp of the tempered logits."""
    teacher_log_sum: Tensor | None
    """None for a signal that does not know all logits."""


Values = TypeVar("Values", bound=tuple[Tensor | None, ...])


def concatenate(values: Sequence[Values]) -> Values:
    """Concatenate the NamedTuples of several chunks, whose fields are values (tokens, ...)."""
    fields: list[Any] = [None if field[0] is None else torch.cat(field) for field in zip(*values, strict=True)]
    return type(values[0])(*fields)


def compare_logits(
    student_logits: Tensor,
    teacher_logits: Tensor,
    softcap_grad: Tensor | None,
    comparison: Comparison,
    sampled: SampledTokens | None,
    buffers: BlockBuffers,
    grad_out: Tensor,
) -> TokenValues:
    """Compare a block of logits (n, vocab), in as few sweeps over the vocabulary as the closed forms need.

    With a formula, the divergence's gradient at the student's tempered logits before a soft-cap goes to `grad_out`
    (n, vocab), which may be the memory of `student_logits`. `softcap_grad`: at the student's logits.
    """
    agreement = top1_agreement(student_logits, teacher_logits)
    q, log_q = softmax(student_logits, comparison.temperature, buffers.student_probs, buffers.student_log_probs)
    p, log_p = softmax(teacher_logits, comparison.temperature, buffers.teacher_probs, buffers.teacher_log_probs)
    student_entropy, teacher_entropy = -dot(q, log_q, buffers.product), -dot(p, log_p, buffers.product)
    log_sums = _log_sum(student_logits, log_q, comparison), _log_sum(teacher_logits, log_p, comparison)
    if sampled:
        importance, reward = importance_and_rewards(sampled.gather(log_q), sampled.gather(log_p), sampled)
    else:
        importance, reward = _without_policy_gradient(student_entropy)
    if comparison.formula:
        divergence = divergence_grad(q, log_q, p, log_p, comparison.formula, softcap_grad, buffers.product, grad_out)
    else:
        divergence = torch.zeros_like(student_entropy)
    return TokenValues(student_entropy, teacher_entropy, agreement, divergence, importance, reward, *log_sums)


def compare_compiled(
    student_logits: Tensor,
    teacher_logits: Tensor,
    softcap_grad: Tensor | None,
    comparison: Comparison,
    sampled: SampledTokens | None,
    buffers: BlockBuffers,
    grad_out: Tensor,
) -> TokenValues:
    """`compare_logits` as fused loops in C++; torch.compile needs a compiler. `buffers` are not used."""
    values, grads = _compiled_comparison()(student_logits, teacher_logits, softcap_grad, comparison, sampled)
    grad_out.copy_(grads)
    return values


@cache
def _compiled_comparison() -> Callable[..., tuple[TokenValues, Tensor]]:
    return torch.compile(_comparison_and_grad)


def _comparison_and_grad(
    student_logits: Tensor,
    teacher_logits: Tensor,
    softcap_grad: Tensor | None,
    comparison: Comparison,
    sampled: SampledTokens | None,
) -> tuple[TokenValues, Tensor]:
    """Changes no argument: for a second shape, torch 2.13 miscompiles a gradient that overwrites `student_logits`."""
    grads = torch.empty_like(student_logits)
    values = compare_logits(student_logits, teacher_logits, softcap_grad, comparison, sampled, BlockBuffers(), grads)
    return values, grads


def compare_signal(
    student_logits: Tensor,
    teacher: TeacherSignal,
    softcap_grad: Tensor | None,
    comparison: Comparison,
    sampled: SampledTokens | None,
    buffers: BlockBuffers,
    grad_out: Tensor,
) -> TokenValues:
    """`compare_logits` for a teacher that knows recorded tokens alone: autograd gives the divergence's gradient.

    Raises InputError for values that the signal cannot give.
    """
    q, log_q = softmax(student_logits, comparison.temperature, buffers.student_probs, buffers.student_log_probs)
    student_entropy = -dot(q, log_q, buffers.product)
    log_sum = _log_sum(student_logits, log_q, comparison)
    teacher_entropy = teacher.entropy(comparison.temperature).to(student_entropy)
    agreement = teacher.top1_agreement(student_logits)
    if sampled:
        importance, reward = importance_and_rewards(sampled.gather(log_q), teacher.log_probs_of(sampled.ids), sampled)
    else:
        importance, reward = _without_policy_gradient(student_entropy)
    divergence = torch.zeros_like(student_entropy)
    if comparison.formula:
        tokens = TokenBlock(log_q, teacher, comparison.temperature)
        divergence = differentiate(comparison.formula, tokens, q, softcap_grad, grad_out)
    return TokenValues(student_entropy, teacher_entropy, agreement, divergence, importance, reward, log_sum, None)


def kernel_fits(student: Tensor) -> bool:
    """Whether the Triton kernel can compare these linear outputs: it runs on GPUs and computes in float32."""
    return student.is_cuda and student.dtype != torch.float64


def compare_by_kernel(
    student: LinearOutputs, teacher: LinearOutputs, comparison: Comparison, sampled: SampledTokens | None
) -> TokenValues:
    """`compare_logits` as a Triton kernel, in float32; the gradient overwrites `student.values`."""
    from tsdkd.core.triton_kernel import compare

    logits = [outputs.logits_of(sampled.ids) for outputs in (student, teacher)] if sampled else []
    formula = comparison.formula or Divergence.jsd(1)  # the kernel forms one in any case
    compared = compare(student, teacher, formula, comparison.temperature)
    if sampled:
        log_sums = compared.student_log_sum, compared.teacher_log_sum
        student_log_probs, teacher_log_probs = (
            z.float() / comparison.temperature - log_sum for z, log_sum in zip(logits, log_sums, strict=True)
        )
        importance, reward = importance_and_rewards(student_log_probs, teacher_log_probs, sampled)
    else:
        importance, reward = _without_policy_gradient(compared.divergence)
    return TokenValues(*compared[:4], importance, reward, *compared[4:])


def _log_sum(logits: Tensor, log_probs: Tensor, comparison: Comparison) -> Tensor:
    """log sum exp of the tempered logits, from the first token's logit and log-probability: (n, vocab) -> (n,)."""
    return logits[:, 0].to(log_probs) / comparison.temperature - log_probs[:, 0]


def _without_policy_gradient(like: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ones_like(like), torch.zeros_like(like)
