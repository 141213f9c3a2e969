"""The objective, eq. (13): three per-token losses, weighted by the selection, averaged over responses.

This is the readable reference; `chunked` is the same without forming all logits, and tested against it.
"""

import torch
from torch import Tensor

from tsdkd.core.config import TERMS, TSDKDConfig
from tsdkd.core.distributions import entropy_of, log_probs
from tsdkd.core.metrics import loss_metrics, to_grid
from tsdkd.core.policy_gradient import Sampled, importance_and_rewards, mean_future_rewards
from tsdkd.core.ranking import plackett_luce_nll
from tsdkd.core.selection import OpenerFraction, check_rows, select
from tsdkd.core.teacher import TeacherHidden, TeacherLogits, TeacherSignal
from tsdkd.errors import InputError


def tsdkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    response_mask: Tensor,
    config: TSDKDConfig,
    opener_fraction: OpenerFraction | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """TSD-KD with the teacher's whole distribution at hand, eq. (13).

    Args:
        student_logits: (batch, seq, vocab), aligned to the positions they predict.
        teacher_logits: the same shape; no gradient flows to it.
        response_mask: bool (batch, seq), True at response tokens; anything may stand elsewhere.
        config: weights and selection.
        opener_fraction: replaces `config.opener` by a fraction for each response (batch,), given or chosen by
            `AdaptiveOpener().fraction`; required when that is "adaptive".

    Returns:
        The loss and the metrics of `token_selective_loss`.

    Raises:
        InputError: shapes that do not fit, a row without response tokens, k not below the vocabulary.
    """
    if student_logits.shape != teacher_logits.shape:
        raise InputError(
            f"Student logits are {tuple(student_logits.shape)}, teacher logits {tuple(teacher_logits.shape)}.",
            "Cut both to the shared vocabulary and align them to the same positions.",
        )
    if student_logits.shape[:2] != response_mask.shape:
        raise InputError(
            f"The mask is {tuple(response_mask.shape)}, but the logits are {tuple(student_logits.shape)}.",
            "Pass a mask of shape (batch, seq).",
        )
    mask = response_mask.bool()
    return token_selective_loss(
        student_logits[mask], TeacherLogits(teacher_logits[mask]), mask, config, opener_fraction
    )


def token_selective_loss(
    student_logits: Tensor,
    teacher: TeacherSignal | TeacherHidden,
    response_mask: Tensor,
    config: TSDKDConfig,
    opener_fraction: OpenerFraction | None = None,
    sampled: Sampled | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The objective for any form of teacher, on response tokens only.

    Args:
        student_logits: (tokens, vocab), the rows of `response_mask`'s True positions, row after row.
        teacher: its signal for the same tokens.
        response_mask: bool (batch, seq); says which tokens make a response.
        config, opener_fraction: as in `tsdkd_loss`.
        sampled: the tokens, as the long-range term needs them.

    Returns:
        The loss, a scalar: the mean over responses, so pieces of a batch are weighed by their number of responses.
        Metrics, detached scalars, each a mean over responses: "indirect", "direct", "entropy", "policy_gradient" (the
        unweighted terms; one with weight 0 is neither formed nor reported), "student_entropy", "teacher_entropy",
        "gate", "opener_length", "rank_agreement" (Kendall's tau on the opener, beside the ranking term),
        "top1_agreement", "response_length". With a long-range term, "direct" is weighed by importance.
    """
    check_rows(response_mask)
    sampled = require_sampled(sampled, teacher, config)
    if isinstance(teacher, TeacherHidden):
        teacher = teacher.formed()
    log_q = log_probs(student_logits, config.temperature)
    student_entropy = entropy_of(log_q.detach())
    teacher_entropy = teacher.entropy(config.temperature).to(student_entropy)
    weights = select(
        to_grid(student_entropy, response_mask),
        to_grid(teacher_entropy, response_mask),
        response_mask,
        config,
        opener_fraction,
    )
    ranking, divergence, certainty = (
        w[response_mask] / len(response_mask) for w in (weights.ranking, weights.divergence, weights.entropy)
    )
    opener, uncertain = ranking > 0, certainty > 0

    terms: dict[str, Tensor] = {}
    scores = None
    if config.alpha:
        ranked = teacher.take(opener).ranked(student_logits[opener], config.k)
        scores = student_logits[opener].gather(-1, ranked) / config.temperature
        terms["indirect"] = (ranking[opener] * plackett_luce_nll(scores, "ranking" in config.released)).sum()
    if config.direct_weight:
        divergences = teacher.divergence(log_q, config.formula, config.temperature)
        if sampled and isinstance(teacher, TeacherLogits):
            importance, rewards = importance_and_rewards(
                sampled.of(log_q), sampled.of(log_probs(teacher.logits)), sampled
            )
            to_come = mean_future_rewards(to_grid(rewards, response_mask), response_mask)[response_mask]
            terms["policy_gradient"] = -(divergence * importance * to_come).sum()
            divergence = divergence * importance.detach()
        terms["direct"] = (divergence * divergences).sum()
    if config.em_weight:
        terms["entropy"] = (certainty[uncertain] * entropy_of(log_q[uncertain])).sum()
    metrics = loss_metrics(
        student_entropy, teacher_entropy, teacher.agrees(student_logits), weights, response_mask, terms, scores
    )
    return weighted_sum(terms, config), metrics


def require_sampled(
    sampled: Sampled | None, teacher: TeacherSignal | TeacherHidden, config: TSDKDConfig
) -> Sampled | None:
    """What the long-range term needs, None without one. Raises InputError where it lacks."""
    if not config.policy_gradient_weight:
        return None
    if sampled is None:
        raise InputError("The long-range term needs to know how the tokens were sampled.", "Pass a Sampled.")
    if not isinstance(teacher, TeacherLogits | TeacherHidden):
        raise InputError(
            "The long-range term needs the teacher's probability of every token.", "Score with --signal hidden."
        )
    return sampled


def weighted_sum(terms: dict[str, Tensor], config: TSDKDConfig) -> Tensor:
    """Eq. (13) from the unweighted terms."""
    return torch.stack([getattr(config, TERMS[name]) * term for name, term in terms.items()]).sum()
