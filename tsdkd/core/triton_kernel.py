"""The first pass over a block of tokens as one Triton kernel, for GPUs; imports Triton, so it is imported late.

What `chunked` does in some thirty sweeps over (n, vocab) takes three here, which read both models' outputs of one token
and keep everything else in registers: maxima and sums; entropies and divergence; the divergence's gradient.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tsdkd.core.config import Divergence
from tsdkd.core.head import Head

STRETCH = 2048
"""Tokens of the vocabulary that a program works on at a time."""
WARPS = 8
LOWEST = tl.constexpr(-1.0e18)
"""In place of logits past the vocabulary: finite, and so are its differences and squares, and improbable."""
TINY = tl.constexpr(1.1754944e-38)
FORWARD, REVERSE, SKEW, SKEW_REVERSE, JSD = (tl.constexpr(kind) for kind in range(5))


class Compared(NamedTuple):
    """Of each token, (n,), in float32."""

    student_entropy: Tensor
    teacher_entropy: Tensor
    agreement: Tensor
    divergence: Tensor
    student_log_sum: Tensor
    """Of the exponentials of the tempered logits."""
    teacher_log_sum: Tensor


def compare(
    student: Tensor, student_head: Head, teacher: Tensor, teacher_head: Head, formula: Divergence, temperature: float
) -> Compared:
    """From both linear layers' outputs (n, vocab).

    `student` becomes the divergence's gradient at the tempered logits before a soft-cap.
    """
    tokens, vocab = student.shape
    results = student.new_empty(6, tokens, dtype=torch.float32)
    with torch.cuda.device_of(student):  # Triton launches on the current device
        _compare[(tokens,)](
            student,
            teacher,
            results,
            tokens,
            vocab,
            student.stride(0),
            teacher.stride(0),
            1 / temperature,
            *_bend(student_head),
            *_bend(teacher_head),
            float(formula.mix),
            float(formula.teacher),
            float(formula.student),
            kind=_kind(formula),
            student_capped=bool(student_head.softcap),
            teacher_capped=bool(teacher_head.softcap),
            stretch=STRETCH,
            num_warps=WARPS,
        )
    return Compared(*results)


def _bend(head: Head) -> tuple[float, float]:
    return float(head.logit_scale), float(head.softcap or 1)


def _kind(formula: Divergence) -> int:
    if formula.mix == 0:
        kind = FORWARD
    elif formula.mix == 1:
        kind = REVERSE
    elif formula.student == 0:
        kind = SKEW
    else:
        kind = SKEW_REVERSE if formula.teacher == 0 else JSD
    return int(kind.value)


@triton.jit
def _logits(row, at, there, scale, cap, capped: tl.constexpr):
    """What a head says of some tokens, in float32, after logit scale and soft-cap."""
    z = tl.load(row + at, mask=there, other=0.0).to(tl.float32) * scale
    if capped:
        z = cap * (2 * tl.sigmoid(2 * z / cap) - 1)
    return tl.where(there, z, LOWEST)


@triton.jit
def _gather(z, cold, peak, total):
    """Running maximum and sum of exponentials, lane by lane."""
    u = z * cold
    higher = tl.maximum(peak, u)
    return higher, total * tl.exp(peak - higher) + tl.exp(u - higher)


@triton.jit
def _log_sum(peak, total):
    highest = tl.max(peak, 0)
    return highest + tl.log(tl.sum(total * tl.exp(peak - highest), 0))


@triton.jit
def _pull(q, log_q, p, log_p, mix, of_teacher, of_student, kind: tl.constexpr):
    """Each token's part of the divergence, and the divergence's gradient at q up to a constant."""
    if kind == FORWARD:
        part, pull = p * (log_p - log_q), q - p
    elif kind == REVERSE:
        pull = log_q - log_p
        part = q * pull
    else:
        log_m = tl.log(tl.maximum(mix * p + (1 - mix) * q, TINY))
        teacher_ratio, student_ratio = log_p - log_m, log_q - log_m
        if kind == SKEW:
            part, pull = p * teacher_ratio, (mix - 1) * tl.exp(teacher_ratio)
        elif kind == SKEW_REVERSE:
            part, pull = q * student_ratio, student_ratio - (1 - mix) * tl.exp(student_ratio)
        else:
            pull = of_student * student_ratio
            part = of_teacher * p * teacher_ratio + q * pull
    return part, pull


@triton.jit
def _compare(
    student,
    teacher,
    results,
    tokens,
    vocab,
    student_stride,
    teacher_stride,
    cold,
    student_scale,
    student_cap,
    teacher_scale,
    teacher_cap,
    mix,
    of_teacher,
    of_student,
    kind: tl.constexpr,
    student_capped: tl.constexpr,
    teacher_capped: tl.constexpr,
    stretch: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    s_row, t_row = student + token * student_stride, teacher + token * teacher_stride
    lane = tl.arange(0, stretch)
    none = tl.zeros([stretch], tl.float32)

    s_peak, s_sum, t_peak, t_sum = none + LOWEST, none, none + LOWEST, none
    s_best, t_best, best_at = none + LOWEST, none + LOWEST, tl.zeros([stretch], tl.int32)
    for start in range(0, vocab, stretch):
        at = start + lane
        z = _logits(s_row, at, at < vocab, student_scale, student_cap, student_capped)
        t = _logits(t_row, at, at < vocab, teacher_scale, teacher_cap, teacher_capped)
        s_peak, s_sum = _gather(z, cold, s_peak, s_sum)
        t_peak, t_sum = _gather(t, cold, t_peak, t_sum)
        best_at = tl.where(z > s_best, at, best_at)
        s_best, t_best = tl.maximum(s_best, z), tl.maximum(t_best, t)
    s_log_sum, t_log_sum = _log_sum(s_peak, s_sum), _log_sum(t_peak, t_sum)
    best = tl.min(tl.where(s_best == tl.max(s_best, 0), best_at, vocab), 0)
    of_best = tl.max(_logits(t_row, best + 0 * lane, lane == 0, teacher_scale, teacher_cap, teacher_capped), 0)

    s_entropy, t_entropy, divergence, pulled = none, none, none, none
    for start in range(0, vocab, stretch):
        at = start + lane
        log_q = _logits(s_row, at, at < vocab, student_scale, student_cap, student_capped) * cold - s_log_sum
        log_p = _logits(t_row, at, at < vocab, teacher_scale, teacher_cap, teacher_capped) * cold - t_log_sum
        q, p = tl.exp(log_q), tl.exp(log_p)
        s_entropy -= q * log_q
        t_entropy -= p * log_p
        part, pull = _pull(q, log_q, p, log_p, mix, of_teacher, of_student, kind)
        divergence += part
        pulled += q * pull
    mean = tl.sum(pulled, 0)

    for start in range(0, vocab, stretch):
        at = start + lane
        z = _logits(s_row, at, at < vocab, student_scale, student_cap, student_capped)
        log_q = z * cold - s_log_sum
        log_p = _logits(t_row, at, at < vocab, teacher_scale, teacher_cap, teacher_capped) * cold - t_log_sum
        q = tl.exp(log_q)
        _, slope = _pull(q, log_q, tl.exp(log_p), log_p, mix, of_teacher, of_student, kind)
        if kind != FORWARD:
            slope = q * (slope - mean)
        if student_capped:
            slope *= 1 - (z / student_cap) * (z / student_cap)
        tl.store(s_row + at, slope.to(student.dtype.element_ty), mask=at < vocab)

    tl.store(results + token, tl.sum(s_entropy, 0))
    tl.store(results + tokens + token, tl.sum(t_entropy, 0))
    tl.store(results + 2 * tokens + token, (of_best == tl.max(t_best, 0)).to(tl.float32))
    tl.store(results + 3 * tokens + token, tl.sum(divergence, 0))
    tl.store(results + 4 * tokens + token, s_log_sum)
    tl.store(results + 5 * tokens + token, t_log_sum)
