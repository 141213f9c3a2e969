"""The objective, eq. (13): three per-token losses, weighted by the selection, averaged over responses.

This is the readable reference. `chunked` gives the same without forming all logits; tests hold it to this module.
"""

import torch
from torch import Tensor

from tsdkd.core.config import TERMS, TSDKDConfig
from tsdkd.core.distributions import entropy_of, log_probs
from tsdkd.core.metrics import RankedTokens, loss_metrics, to_grid
from tsdkd.core.policy_gradient import SampledTokens, importance_and_rewards, mean_future_rewards, require_sampled
from tsdkd.core.ranking import outside_mass, plackett_luce_nll
from tsdkd.core.selection import OpenerFraction, check_rows, select
from tsdkd.core.teacher_signals import TeacherLogits, TeacherSignal
from tsdkd.errors import InputError


def tsdkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    response_mask: Tensor,
    config: TSDKDConfig,
    opener_fraction: OpenerFraction | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """TSD-KD from the logits of both models, eq. (13).

    Args:
        student_logits: (batch, seq, vocab), aligned to the positions they predict.
        teacher_logits: the same shape; no gradient flows to it.
        response_mask: bool (batch, seq), True at response tokens; other positions may hold anything.
        config: weights and selection.
        opener_fraction: replaces `config.opener`: a fraction for each response (batch,), or a function that gives it,
            such as `AdaptiveOpener().fraction`; required when `config.opener` is "adaptive".

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
    teacher: TeacherSignal,
    response_mask: Tensor,
    config: TSDKDConfig,
    opener_fraction: OpenerFraction | None = None,
    sampled: SampledTokens | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The objective for any teacher signal, on response tokens only.

    Args:
        student_logits: (tokens, vocab), the rows of `response_mask`'s True positions, row after row.
        teacher: its signal at the same tokens.
        response_mask: bool (batch, seq), True at response tokens.
        config: as in `tsdkd_loss`.
        opener_fraction: as in `tsdkd_loss`.
        sampled: the tokens with their sampling probabilities; required for a policy gradient.

    Returns:
        The loss, a scalar: the mean over responses, so micro-batches are weighted by their number of responses.
        Metrics, detached scalars, each a mean over responses: "indirect", "direct", "entropy", "policy_gradient" (the
        unweighted terms; a term with weight 0 is neither formed nor reported), "student_entropy", "teacher_entropy",
        "gate", "opener_length", "top1_agreement" (if the signal knows it), "response_length". With an indirect term
        also, over the opener: "rank_agreement" (Kendall's tau), "student_outside_mass" and "teacher_outside_mass" (each
        model's tempered probability outside the candidates that are ranked; the teacher's if the signal knows it). With
        a policy gradient, "direct" is weighted by importance.

    Raises:
        InputError: a row without response tokens, k not below the vocabulary, no `sampled` for a policy gradient, a
            signal without the values that a term needs.
    """
    check_rows(response_mask)
    sampled = require_sampled(sampled, config)
    teacher = teacher.materialized()
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
    indirect, direct, entropy = (
        w[response_mask] / len(response_mask) for w in (weights.indirect, weights.direct, weights.entropy)
    )
    opener, uncertain = indirect > 0, entropy > 0

    terms: dict[str, Tensor] = {}
    ranked = None
    if config.alpha:
        opener_teacher = teacher.take(opener)
        candidates = opener_teacher.ranked_candidates(student_logits[opener], config.k)
        candidate_logits = student_logits[opener].gather(-1, candidates) / config.temperature
        ranked = RankedTokens(
            candidate_logits,
            outside_mass(log_q.detach()[opener].gather(-1, candidates)),
            opener_teacher.outside_mass(candidates, config.temperature, None),
        )
        nll = plackett_luce_nll(candidate_logits, "ranking" in config.released)
        terms["indirect"] = (indirect[opener] * nll).sum()
    if config.direct_weight:
        if sampled:
            teacher_log_probs = teacher.log_probs_of(sampled.ids)
            importance, rewards = importance_and_rewards(sampled.gather(log_q), teacher_log_probs, sampled)
            future_rewards = mean_future_rewards(to_grid(rewards, response_mask), response_mask)[response_mask]
            terms["policy_gradient"] = -(direct * importance * future_rewards).sum()
            direct = direct * importance.detach()
        terms["direct"] = (direct * teacher.divergence(log_q, config.formula, config.temperature)).sum()
    if config.em_weight:
        terms["entropy"] = (entropy[uncertain] * entropy_of(log_q[uncertain])).sum()
    means = {
        "student_entropy": student_entropy,
        "teacher_entropy": teacher_entropy,
        "top1_agreement": teacher.top1_agreement(student_logits),
        "gate": weights.gate[response_mask],
    }
    metrics = loss_metrics(terms, means, weights.indirect > 0, response_mask, ranked)
    return weighted_sum(terms, config), metrics


def weighted_sum(terms: dict[str, Tensor], config: TSDKDConfig) -> Tensor:
    """Eq. (13): the unweighted terms, by the names in `TERMS`, times their weights in the config."""
    return torch.stack([getattr(config, TERMS[name]) * term for name, term in terms.items()]).sum()
