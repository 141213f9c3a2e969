"""The objective from hidden states: value and gradients of `token_selective_loss` without the logits of all tokens."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tsdkd.core.chunk_sizes import chunk_sizes
from tsdkd.core.config import TSDKDConfig
from tsdkd.core.features import NO_CONTEXT, ResponseContext
from tsdkd.core.lm_head import Head
from tsdkd.core.pass_terms import ConfigTerms, FeatureTerms, PassTerms, SelectiveTerms
from tsdkd.core.policy_gradient import SampledTokens, require_sampled
from tsdkd.core.selection import OpenerFraction, check_rows
from tsdkd.core.selective_objective import SelectiveObjective, Weighted
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
    objective: TSDKDConfig | SelectiveObjective,
    opener_fraction: OpenerFraction | None = None,
    chunk: int | None = None,
    compiled: bool = False,
    sampled: SampledTokens | None = None,
    context: ResponseContext = NO_CONTEXT,
    selected: Mapping[str, Weighted] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`token_selective_loss` from the student's hidden states (tokens, width). It can be differentiated once.

    The student's matrix products run in autocast's precision, else in its hidden states', the teacher's in its head's;
    everything else runs in float32 or better.

    Args:
        student_hidden: the rows of `response_mask`'s True positions, row after row.
        student_head: its weight and bias receive gradients where they require them.
        teacher: as in `token_selective_loss`, and so are all arguments but the next two.
        chunk: tokens per matrix product; by default it follows from `chunk_sizes.CHUNK_BYTES` and free memory.
        compiled: fuse the work between the products, which pays off after some seconds of compilation; it needs a
            teacher whose whole distribution is known, and the losses of a `TSDKDConfig`.

    Raises:
        InputError: a row without response tokens, k not below the vocabulary, numbers of tokens or vocabularies that
            do not fit, float16 (the gradients of single tokens vanish in it), a signal without the values that
            a term or `compiled` needs.
    """
    precision = _precision(student_hidden)
    _check_fit(student_hidden, student_head, teacher, response_mask)
    if compiled and teacher.vocab is None:
        raise InputError(
            "The compiled objective needs the teacher's probability of every token.",
            "Leave out --compile, or score with --signal hidden.",
        )
    if compiled and isinstance(objective, SelectiveObjective):
        raise InputError("The compiled objective has the losses of TSD-KD and its relatives.", "Leave out --compile.")
    objective.check_vocab(student_head.vocab)
    leaves = differentiable_tensors(student_hidden, student_head)
    requires_grad = [torch.is_grad_enabled() and leaf is not None and leaf.requires_grad for leaf in leaves]
    with torch.no_grad(), torch.autocast(student_hidden.device.type, enabled=False):
        student = StudentLogits(student_hidden, student_head, precision, requires_grad)
        terms: PassTerms
        if isinstance(objective, SelectiveObjective):
            ids = None if sampled is None else sampled.ids
            terms = SelectiveTerms(objective, response_mask, ids, context, selected, student.wide)
        else:
            sampled = require_sampled(sampled, objective)
            terms = ConfigTerms(objective, response_mask, sampled, opener_fraction, student.wide)
        sizes = chunk_sizes(student.hidden, student.vocab, terms.k, teacher.width, chunk)
        loss, metrics = TwoPasses(student, teacher, terms, sizes, compiled).run()
    attach: Any = WithPrecomputedGradients.apply  # typed by some versions of torch only
    return attach(loss, student.gradients, *leaves), metrics


def token_features_from_hidden(
    student_hidden: Tensor,
    student_head: Head,
    teacher: TeacherSignal,
    response_mask: Tensor,
    objective: SelectiveObjective,
    ids: Tensor | None = None,
    chunk: int | None = None,
) -> dict[str, Tensor]:
    """The features of an objective that both models' distributions decide, by name: (tokens,) each, in one pass.

    With them, the weights of a whole optimizer step can be selected before its first loss. Arguments and errors are
    those of `token_selective_loss_from_hidden`; `ids`: the response's tokens (tokens,).
    """
    precision = _precision(student_hidden)
    _check_fit(student_hidden, student_head, teacher, response_mask)
    objective.check_vocab(student_head.vocab)
    with torch.no_grad(), torch.autocast(student_hidden.device.type, enabled=False):
        student = StudentLogits(student_hidden, student_head, precision, [False] * 3)
        terms = FeatureTerms(objective, ids)
        sizes = chunk_sizes(student.hidden, student.vocab, 1, teacher.width, chunk)
        values, _, formed = TwoPasses(student, teacher, terms, sizes, compiled=False).first_pass()
    found = {"student_entropy": values.student_entropy, "teacher_entropy": values.teacher_entropy, **formed}
    return {name: found[name] for name in objective.features if name in found}


def _precision(hidden: Tensor) -> torch.dtype:
    """Autocast's precision, else that of the hidden states. Raises InputError for float16."""
    device = hidden.device.type
    precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    if precision == torch.float16:
        raise InputError("The objective cannot be computed in float16.", "Use bfloat16 or float32.")
    return precision


def _check_fit(hidden: Tensor, head: Head, teacher: TeacherSignal, response_mask: Tensor) -> None:
    check_rows(response_mask)
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
