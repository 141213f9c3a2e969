"""The metrics that the loss reports beside its value: means over responses."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class RankedTokens(NamedTuple):
    """Values of the tokens whose candidates are ranked, those of the opener."""

    candidate_logits: Tensor
    """The student's tempered logits of its candidates (n, k), in the teacher's order."""
    student_outside_mass: Tensor
    """The student's probability outside the candidates (n,)."""
    teacher_outside_mass: Tensor | None
    """The teacher's probability outside them (n,); None for a signal that does not know it."""


@torch.no_grad()
def loss_metrics(
    terms: Mapping[str, Tensor],
    means: Mapping[str, Tensor | None],
    response_mask: Tensor,
    ranking_mask: Tensor | None,
    ranked: RankedTokens | None,
) -> dict[str, Tensor]:
    """The metrics of `token_selective_loss`, detached scalars.

    Args:
        terms: the unweighted terms.
        means: values (tokens,), by the name of the metric that is their mean; None for unknown values.
        response_mask: bool (batch, seq).
        ranking_mask: the tokens whose candidates are ranked, such as the opener: bool (batch, seq); None without any.
        ranked: values of these tokens; None without any.
    """
    metrics = {name: term.detach() for name, term in terms.items()}
    for name, values in means.items():
        if values is not None:
            metrics[name] = _mean_of_means(to_grid(values, response_mask), response_mask)
    metrics["response_length"] = response_mask.sum() / len(response_mask)
    if ranked is not None and ranking_mask is not None and len(ranked.candidate_logits):
        on_ranking = {
            "rank_agreement": _kendall_tau(ranked.candidate_logits),
            "student_outside_mass": ranked.student_outside_mass,
            "teacher_outside_mass": ranked.teacher_outside_mass,
        }
        for name, values in on_ranking.items():
            if values is not None:
                metrics[name] = _mean_of_means(to_grid(values, ranking_mask), ranking_mask)
    return metrics


def selective_metrics(
    terms: Mapping[str, Tensor],
    means: Mapping[str, Tensor | None],
    term_masks: Mapping[str, Tensor],
    response_mask: Tensor,
    ranked: Mapping[str, RankedTokens],
) -> dict[str, Tensor]:
    """`loss_metrics` of a selection of one's own, and the fraction of tokens with a weight in each term.

    `term_masks`: these tokens (batch, seq), by term. `ranked`: the ranked ones, of which the first term is reported.
    """
    fractions = {f"{name}_selected": mask[response_mask].float() for name, mask in term_masks.items()}
    name = next((name for name in term_masks if name in ranked), None)
    ranking = (None, None) if name is None else (term_masks[name], ranked[name])
    return loss_metrics(terms, {**means, **fractions}, response_mask, *ranking)


def to_grid(values: Tensor, mask: Tensor) -> Tensor:
    """Values of the mask's True positions (n,), row after row -> (batch, seq), 0 elsewhere."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def _mean_of_means(values: Tensor, mask: Tensor) -> Tensor:
    rows = mask.any(-1)  # a response may have no ranked tokens
    return (values.where(mask, 0).sum(-1)[rows] / mask.sum(-1)[rows]).mean()


def _kendall_tau(scores_best_first: Tensor) -> Tensor:
    k = scores_best_first.shape[-1]
    better = (torch.sign(scores_best_first[:, i : i + 1] - scores_best_first[:, i + 1 :]).sum(-1) for i in range(k - 1))
    return torch.stack(list(better)).sum(0) / (k * (k - 1) / 2)
