"""`comparison.compare_logits` as one Triton kernel, for GPUs. Imports Triton, so callers import it on first use.

Each program reads both models' linear outputs at one token three times and keeps everything else in registers. The
sweeps compute maxima and sums of exponentials, then entropies and divergence, then the divergence's gradient.
`compare_logits` takes some thirty sweeps.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tsdkd.core.lm_head import LinearOutputs
from tsdkd.core.losses import Divergence

VOCAB_BLOCK = 2048
"""Tokens of the vocabulary that a program works on at a time."""
WARPS = 8
LOWEST = tl.constexpr(-1.0e18)
"""Stands for logits past the vocabulary: its probability is 0, and its differences and squares are finite."""
TINY = tl.constexpr(1.1754944e-38)
FORWARD, REVERSE, SKEW, SKEW_REVERSE, JSD = (tl.constexpr(kind) for kind in range(5))


class KernelValues(NamedTuple):
    """Values of each token, (n,), in float32; names as in `TokenValues`."""

    student_entropy: Tensor
    teacher_entropy: Tensor
    top1_agreement: Tensor
    divergence: Tensor
    student_log_sum: Tensor
    """log sum exp of the tempered logits."""
    teacher_log_sum: Tensor


def compare(student: LinearOutputs, teacher: LinearOutputs, formula: Divergence, temperature: float) -> KernelValues:
    """Compare both models' linear outputs (n, columns) of the same vocabulary.

    The divergence's gradient at the student's tempered logits before a soft-cap overwrites `student.values`.
    """
    tokens, vocab = student.in_vocab.shape
    results = student.values.new_empty(len(KernelValues._fields), tokens, dtype=torch.float32)
    with torch.cuda.device_of(student.values):  # Triton launches on the current device
        _compare[(tokens,)](
            student.values,
            teacher.values,
            results,
            tokens,
            vocab,
            student.values.shape[1],
            teacher.values.shape[1],
            student.values.stride(0),
            teacher.values.stride(0),
            1 / temperature,
            float(student.logit_scale),
            float(student.softcap or 1),
            float(teacher.logit_scale),
            float(teacher.softcap or 1),
            float(formula.mix),
            float(formula.teacher_weight),
            float(formula.student_weight),
            kind=_kind(formula),
            student_capped=bool(student.softcap),
            teacher_capped=bool(teacher.softcap),
            vocab_block=VOCAB_BLOCK,
            num_warps=WARPS,
        )
    return KernelValues(*results)


def _kind(formula: Divergence) -> int:
    if formula.mix == 0:
        kind = FORWARD
    elif formula.mix == 1:
        kind = REVERSE
    elif formula.student_weight == 0:
        kind = SKEW
    else:
        kind = SKEW_REVERSE if formula.teacher_weight == 0 else JSD
    return int(kind.value)


@triton.jit
def _logits(row, ids, vocab, columns, scale, cap, capped: tl.constexpr):
    """Logits of some tokens of the vocabulary, in float32, after logit scale and soft-cap.

    It reads whole rows: loads up to a multiple of 16 are several times as fast as those up to other numbers.
    """
    z = tl.load(row + ids, mask=ids < columns, other=0.0).to(tl.float32) * scale
    if capped:
        z = cap * (2 * tl.sigmoid(2 * z / cap) - 1)
    return tl.where(ids < vocab, z, LOWEST)


@triton.jit
def _add_exp(z, inverse_temperature, peak, total):
    """Running maximum and sum of exponentials, lane by lane; of the two factors, one is exp(0)."""
    u = z * inverse_temperature
    factor = tl.exp(-tl.abs(u - peak))
    return tl.maximum(peak, u), tl.where(u > peak, total * factor + 1, total + factor)


@triton.jit
def _log_sum(peak, total):
    highest = tl.max(peak, 0)
    return highest + tl.log(tl.sum(total * tl.exp(peak - highest), 0))


@triton.jit
def _divergence(q, log_q, p, log_p, mix, teacher_weight, student_weight, kind: tl.constexpr):
    """Each vocabulary entry's summand of the divergence, and the gradient at q, up to a constant (forward KL: at z)."""
    if kind == FORWARD:
        summand, grad = p * (log_p - log_q), q - p
    elif kind == REVERSE:
        grad = log_q - log_p
        summand = q * grad
    else:
        log_m = tl.log(tl.maximum(mix * p + (1 - mix) * q, TINY))
        teacher_ratio, student_ratio = log_p - log_m, log_q - log_m
        if kind == SKEW:
            summand, grad = p * teacher_ratio, (mix - 1) * tl.exp(teacher_ratio)
        elif kind == SKEW_REVERSE:
            summand, grad = q * student_ratio, student_ratio - (1 - mix) * tl.exp(student_ratio)
        else:
            grad = student_weight * student_ratio
            summand = teacher_weight * p * teacher_ratio + q * grad
    return summand, grad


@triton.jit
def _compare(
    student_and_grad,
    teacher,
    results,
    tokens,
    vocab,
    student_columns,
    teacher_columns,
    student_stride,
    teacher_stride,
    inverse_temperature,
    student_scale,
    student_cap,
    teacher_scale,
    teacher_cap,
    mix,
    teacher_weight,
    student_weight,
    kind: tl.constexpr,
    student_capped: tl.constexpr,
    teacher_capped: tl.constexpr,
    vocab_block: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    s_row, t_row = student_and_grad + token * student_stride, teacher + token * teacher_stride
    lane = tl.arange(0, vocab_block)
    zeros = tl.zeros([vocab_block], tl.float32)

    s_peak, s_sum, t_peak, t_sum = zeros + LOWEST, zeros, zeros + LOWEST, zeros
    s_max, t_max, s_argmax = zeros + LOWEST, zeros + LOWEST, tl.zeros([vocab_block], tl.int32)
    for start in range(0, vocab, vocab_block):
        ids = start + lane
        z = _logits(s_row, ids, vocab, student_columns, student_scale, student_cap, student_capped)
        t = _logits(t_row, ids, vocab, teacher_columns, teacher_scale, teacher_cap, teacher_capped)
        s_peak, s_sum = _add_exp(z, inverse_temperature, s_peak, s_sum)
        t_peak, t_sum = _add_exp(t, inverse_temperature, t_peak, t_sum)
        s_argmax = tl.where(z > s_max, ids, s_argmax)
        s_max, t_max = tl.maximum(s_max, z), tl.maximum(t_max, t)
    s_log_sum, t_log_sum = _log_sum(s_peak, s_sum), _log_sum(t_peak, t_sum)
    s_top = tl.min(tl.where(s_max == tl.max(s_max, 0), s_argmax, vocab), 0)  # the first of equals
    top_ids = s_top + 0 * lane
    t_at_s_top = tl.max(_logits(t_row, top_ids, vocab, teacher_columns, teacher_scale, teacher_cap, teacher_capped), 0)

    s_entropy, t_entropy, divergence, weighted_grad = zeros, zeros, zeros, zeros
    for start in range(0, vocab, vocab_block):
        ids = start + lane
        z = _logits(s_row, ids, vocab, student_columns, student_scale, student_cap, student_capped)
        t = _logits(t_row, ids, vocab, teacher_columns, teacher_scale, teacher_cap, teacher_capped)
        log_q, log_p = z * inverse_temperature - s_log_sum, t * inverse_temperature - t_log_sum
        q, p = tl.exp(log_q), tl.exp(log_p)
        s_entropy -= q * log_q
        t_entropy -= p * log_p
        summand, grad = _divergence(q, log_q, p, log_p, mix, teacher_weight, student_weight, kind)
        divergence += summand
        weighted_grad += q * grad
    mean_grad = tl.sum(weighted_grad, 0)

    for start in range(0, vocab, vocab_block):
        ids = start + lane
        z = _logits(s_row, ids, vocab, student_columns, student_scale, student_cap, student_capped)
        t = _logits(t_row, ids, vocab, teacher_columns, teacher_scale, teacher_cap, teacher_capped)
        log_q, log_p = z * inverse_temperature - s_log_sum, t * inverse_temperature - t_log_sum
        q = tl.exp(log_q)
        _, grad = _divergence(q, log_q, tl.exp(log_p), log_p, mix, teacher_weight, student_weight, kind)
        if kind != FORWARD:
            grad = q * (grad - mean_grad)
        if student_capped:
            grad *= 1 - (z / student_cap) * (z / student_cap)
        tl.store(s_row + ids, grad.to(student_and_grad.dtype.element_ty), mask=ids < student_columns)

    tl.store(results + token, tl.sum(s_entropy, 0))
    tl.store(results + tokens + token, tl.sum(t_entropy, 0))
    tl.store(results + 2 * tokens + token, (t_at_s_top == tl.max(t_max, 0)).to(tl.float32))
    tl.store(results + 3 * tokens + token, tl.sum(divergence, 0))
    tl.store(results + 4 * tokens + token, s_log_sum)
    tl.store(results + 5 * tokens + token, t_log_sum)
