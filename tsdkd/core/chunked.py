"""The objective from hidden states: value and gradients of `token_selective_loss` without the logits of all tokens."""

from typing import Any

import torch
from torch import Tensor

from tsdkd.core.chunk_sizes import chunk_sizes
from tsdkd.core.config import TSDKDConfig
from tsdkd.core.lm_head import Head
from tsdkd.core.policy_gradient import SampledTokens, require_sampled
from tsdkd.core.ranking import check_k
from tsdkd.core.selection import OpenerFraction, check_rows
from tsdkd.core.student_logits import StudentLogits, WithPrecomputedGradients, differentiable_tensors
from tsdkd.core.teacher_signals import TeacherHidden, TeacherSignal
from tsdkd.core.two_passes import TwoPasses
from tsdkd.errors import InputError


def tsdkd_loss_from_hidden(
    student_hidden: Tensor,
    student_head: Head,
    teacher_hidden: Tensor,
    teacher_head: Head,
    response_mask: Tensor,
    config: TSDKDConfig,
    opener_fraction: OpenerFraction | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`tsdkd_loss` from hidden states after the last norm: same value and gradients, no (batch, seq, vocab).

    Args:
        student_hidden: (batch, seq, width), aligned to the positions they predict.
        student_head: its weight and bias receive gradients where they require them.
        teacher_hidden: (batch, seq, teacher width); no gradient flows to the teacher.
        teacher_head: of the same vocabulary.
        response_mask: bool (batch, seq), True at response tokens; other positions may hold anything.
        config: as in `tsdkd_loss`.
        opener_fraction: as in `tsdkd_loss`.

    Returns:
        The loss and the metrics of `token_selective_loss`.

    Raises:
        InputError: shapes or vocabularies that do not fit, a row without response tokens, k not below the vocabulary,
            float16.
    """
    if not student_hidden.shape[:2] == teacher_hidden.shape[:2] == response_mask.shape:
        raise InputError(
            f"Student hidden states are {tuple(student_hidden.shape)}, the teacher's {tuple(teacher_hidden.shape)}, "
            f"the mask {tuple(response_mask.shape)}.",
            "Align all three to the same (batch, seq).",
        )
    mask = response_mask.bool()
    return token_selective_loss_from_hidden(
        student_hidden[mask],
        student_head,
        TeacherHidden(teacher_hidden[mask], teacher_head),
        mask,
        config,
        opener_fraction,
    )


def token_selective_loss_from_hidden(
    student_hidden: Tensor,
    student_head: Head,
    teacher: TeacherSignal,
    response_mask: Tensor,
    config: TSDKDConfig,
    opener_fraction: OpenerFraction | None = None,
    chunk: int | None = None,
    compiled: bool = False,
    sampled: SampledTokens | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`token_selective_loss` from the student's hidden states (tokens, width). It can be differentiated once.

    The student's matrix products run in autocast's precision, else in its hidden states', the teacher's in its head's;
    everything else runs in float32 or better.

    Args:
        student_hidden: the rows of `response_mask`'s True positions, row after row.
        student_head: its weight and bias receive gradients where they require them.
        teacher: as in `token_selective_loss`, and so are response_mask, config, opener_fraction and sampled.
        chunk: tokens per matrix product; by default it follows from `chunk_sizes.CHUNK_BYTES` and free memory.
        compiled: fuse the work between the products, which pays off after some seconds of compilation; it needs a
            teacher whose whole distribution is known.

    Raises:
        InputError: a row without response tokens, k not below the vocabulary, numbers of tokens or vocabularies that
            do not fit, float16 (the gradients of single tokens vanish in it), a signal without the values that
            a term or `compiled` needs.
    """
    check_rows(response_mask)
    _check_fit(student_hidden, student_head, teacher, response_mask)
    if compiled and teacher.vocab is None:
        raise InputError(
            "The compiled objective needs the teacher's probability of every token.",
            "Leave out --compile, or score with --signal hidden.",
        )
    if config.alpha:
        check_k(config.k, student_head.vocab)
    sampled = require_sampled(sampled, config)
    leaves = differentiable_tensors(student_hidden, student_head)
    requires_grad = [torch.is_grad_enabled() and leaf is not None and leaf.requires_grad for leaf in leaves]
    device = student_hidden.device.type
    precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else student_hidden.dtype
    if precision == torch.float16:
        raise InputError("The objective cannot be computed in float16.", "Use bfloat16 or float32.")
    with torch.no_grad(), torch.autocast(device, enabled=False):
        student = StudentLogits(student_hidden, student_head, precision, requires_grad)
        sizes = chunk_sizes(student.hidden, student.vocab, config.k, teacher.width, chunk)
        passes = TwoPasses(student, teacher, response_mask, config, sampled, sizes, compiled)
        loss, metrics = passes.run(opener_fraction)
    attach: Any = WithPrecomputedGradients.apply  # typed by some versions of torch only
    return attach(loss, student.gradients, *leaves), metrics


def _check_fit(hidden: Tensor, head: Head, teacher: TeacherSignal, response_mask: Tensor) -> None:
    tokens = int(response_mask.sum())
    if not len(hidden) == len(teacher) == tokens:
        raise InputError(
            f"The mask has {tokens} response tokens, the student {len(hidden)}, the teacher {len(teacher)}.",
            "Pass the rows of the mask's True positions, of both models.",
        )
    if teacher.vocab not in {None, head.vocab}:
        raise InputError(
            f"The student's head has {head.vocab} tokens, the teacher's {teacher.vocab}.",
            "Give both heads the shared vocab_size.",
        )
