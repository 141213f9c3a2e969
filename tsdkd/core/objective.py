"""The objective, eq. (13): three per-token losses, weighted by the selection, averaged over responses.

This is the readable reference. `chunked` gives the same without forming all logits; tests hold it to this module.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from tsdkd.core.config import TERMS, TSDKDConfig
from tsdkd.core.distributions import entropy_of, log_probs
from tsdkd.core.feature_values import feature_set, features_of
from tsdkd.core.features import NO_CONTEXT, ResponseContext
from tsdkd.core.losses import Loss, Ranking, Temperature, TokenBlock
from tsdkd.core.metrics import RankedTokens, loss_metrics, selective_metrics, to_grid
from tsdkd.core.pass_terms import by_token
from tsdkd.core.policy_gradient import SampledTokens, importance_and_rewards, mean_future_rewards, require_sampled
from tsdkd.core.ranking import outside_mass
from tsdkd.core.selection import OpenerFraction, check_rows, select
from tsdkd.core.selective_objective import SelectiveObjective, Weighted
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
    objective: TSDKDConfig | SelectiveObjective,
    opener_fraction: OpenerFraction | None = None,
    sampled: SampledTokens | None = None,
    context: ResponseContext = NO_CONTEXT,
    selected: Mapping[str, Weighted] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """An objective for any teacher signal, on response tokens only.

    Args:
        student_logits: (tokens, vocab), the rows of `response_mask`'s True positions, row after row.
        teacher: its signal at the same tokens.
        response_mask: bool (batch, seq), True at response tokens.
        objective: the weights and selection of `tsdkd_loss`, or losses with a selection of one's own.
        opener_fraction: as in `tsdkd_loss`.
        sampled: the tokens with their sampling probabilities; required for a policy gradient.
        context: what a selection of one's own reads beside the tokens.
        selected: its weights, if they were selected beforehand.

    Returns:
        The loss, a scalar: the mean over responses, so micro-batches are weighted by their number of responses.
        Metrics, detached scalars, each a mean over responses: "indirect", "direct", "entropy", "policy_gradient" (the
        unweighted terms; a term with weight 0 is neither formed nor reported), "student_entropy", "teacher_entropy",
        "gate", "opener_length", "top1_agreement" (if the signal knows it), "response_length". With an indirect term
        also, over the opener: "rank_agreement" (Kendall's tau), "student_outside_mass" and "teacher_outside_mass" (each
        model's tempered probability outside the candidates that are ranked; the teacher's if the signal knows it). With
        a policy gradient, "direct" is weighted by importance. A selection of one's own has its losses' names in place
        of the three terms', no gate and no opener length, and "NAME_selected", the fraction of tokens that have a
        weight in a loss.

    Raises:
        InputError: a row without response tokens, k not below the vocabulary, no `sampled` for a policy gradient, a
            signal without the values that a term or a feature needs, a selection whose weights do not fit.
    """
    check_rows(response_mask)
    objective.check_vocab(student_logits.shape[-1])
    teacher = teacher.materialized()
    if isinstance(objective, SelectiveObjective):
        return _selective_loss(student_logits, teacher, response_mask, objective, sampled, context, selected)
    return _config_loss(student_logits, teacher, response_mask, objective, opener_fraction, sampled)


def _config_loss(
    student_logits: Tensor,
    teacher: TeacherSignal,
    response_mask: Tensor,
    config: TSDKDConfig,
    opener_fraction: OpenerFraction | None,
    sampled: SampledTokens | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    sampled = require_sampled(sampled, config)
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
    by_term = {"indirect": indirect, "entropy": entropy}
    if sampled:
        teacher_log_probs = teacher.log_probs_of(sampled.ids)
        importance, rewards = importance_and_rewards(sampled.gather(log_q.detach()), teacher_log_probs, sampled)
        direct = direct * importance
        future_rewards = mean_future_rewards(to_grid(rewards, response_mask), response_mask)[response_mask]
        by_term["policy_gradient"] = direct * future_rewards

    losses = config.losses | ({"direct": config.formula} if config.direct_weight else {})
    terms = {
        name: _term(losses[name], by_term.get(name, direct), student_logits, teacher, config.temperature, sampled)
        for name in TERMS
        if name in losses
    }
    means = {
        "student_entropy": student_entropy,
        "teacher_entropy": teacher_entropy,
        "top1_agreement": teacher.top1_agreement(student_logits),
        "gate": weights.gate[response_mask],
    }
    opener = indirect > 0
    ranked = None
    if config.alpha:
        ranked = _rank(
            config.k, config.temperature, student_logits[opener], log_q.detach()[opener], teacher.take(opener)
        )
    metrics = loss_metrics(terms, means, response_mask, weights.indirect > 0, ranked)
    metrics["opener_length"] = opener.sum() / len(response_mask)
    return weighted_sum(terms, {name: getattr(config, TERMS[name]) for name in terms}), metrics


def _selective_loss(
    student_logits: Tensor,
    teacher: TeacherSignal,
    response_mask: Tensor,
    objective: SelectiveObjective,
    sampled: SampledTokens | None,
    context: ResponseContext,
    selected: Mapping[str, Weighted] | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    logits = student_logits.detach()
    log_q = log_probs(logits)
    entropies = {"student_entropy": entropy_of(log_q), "teacher_entropy": teacher.entropy(1).to(log_q)}
    if selected is None:
        formed = feature_set(objective).form(logits, teacher, None if sampled is None else sampled.ids)
        selected = objective.weigh(features_of(objective, response_mask, entropies | formed, context))
    weights = by_token(selected, response_mask, log_q.dtype)
    terms = {
        name: _term(loss, weights[name].weights, student_logits, teacher, weights[name].temperature, sampled)
        for name, loss in objective.losses.items()
    }
    ranked = {}
    for name, loss in objective.losses.items():
        rows, temperature = weights[name].weights != 0, weights[name].temperature
        tempered = isinstance(temperature, Tensor) or temperature != 1
        if isinstance(loss, Ranking) and not loss.rest and not tempered and rows.any():
            ranked[name] = _rank(loss.k, 1, logits[rows], log_q[rows], teacher.take(rows))
    means = entropies | {"top1_agreement": teacher.top1_agreement(student_logits)}
    grids = {name: to_grid(term.weights != 0, response_mask) for name, term in weights.items()}
    metrics = selective_metrics(terms, means, grids, response_mask, ranked)
    return weighted_sum(terms, {name: term.factor for name, term in weights.items()}), metrics


def _term(
    loss: Loss,
    weights: Tensor,
    student_logits: Tensor,
    teacher: TeacherSignal,
    temperature: Temperature,
    sampled: SampledTokens | None,
) -> Tensor:
    """The weighted sum of a loss over the tokens that have a weight (tokens,)."""
    rows = weights != 0
    divisor = temperature[rows].unsqueeze(-1) if isinstance(temperature, Tensor) else temperature
    ids = None if sampled is None else sampled.ids[rows]
    tokens = TokenBlock(log_probs(student_logits[rows], divisor), teacher.take(rows), divisor, ids)
    return (weights[rows] * loss.values(tokens)).sum()


def _rank(k: int, temperature: float, student_logits: Tensor, log_q: Tensor, teacher: TeacherSignal) -> RankedTokens:
    """The values of ranked tokens that the metrics need."""
    candidates = teacher.ranked_candidates(student_logits, k)
    scores = student_logits.detach().gather(-1, candidates) / temperature
    masses = outside_mass(log_q.gather(-1, candidates)), teacher.outside_mass(candidates, temperature, None)
    return RankedTokens(scores, *masses)


def weighted_sum(terms: Mapping[str, Tensor], factors: Mapping[str, float]) -> Tensor:
    """Eq. (13): the unweighted terms times their factors, by name."""
    return torch.stack([factors[name] * term for name, term in terms.items()]).sum()
