"""The metrics that the loss reports beside its value: means over responses."""

from typing import NamedTuple

import torch
from torch import Tensor


class RankedTokens(NamedTuple):
    """Values of the opener's tokens, whose candidates are ranked."""

    candidate_logits: Tensor
    """The student's tempered logits of its candidates (n, k), in the teacher's order."""
    student_outside_mass: Tensor
    """The student's probability outside the candidates (n,)."""
    teacher_outside_mass: Tensor | None
    """The teacher's probability outside them (n,); None for a signal that does not know it."""


@torch.no_grad()
def loss_metrics(
    terms: dict[str, Tensor],
    means: dict[str, Tensor | None],
    opener: Tensor,
    response_mask: Tensor,
    ranked: RankedTokens | None,
) -> dict[str, Tensor]:
    """The metrics of `token_selective_loss`, detached scalars.

    Args:
        terms: the unweighted terms.
        means: values (tokens,), by the name of the metric that is their mean; None for unknown values.
        opener: bool (batch, seq).
        response_mask: bool (batch, seq).
        ranked: values of the opener's tokens; None without an indirect term.
    """
    metrics = {name: term.detach() for name, term in terms.items()}
    for name, values in means.items():
        if values is not None:
            metrics[name] = _mean_of_means(to_grid(values, response_mask), response_mask)
    metrics["opener_length"] = opener.sum() / len(response_mask)
    metrics["response_length"] = response_mask.sum() / len(response_mask)
    if ranked is not None and len(ranked.candidate_logits):
        on_opener = {
            "rank_agreement": _kendall_tau(ranked.candidate_logits),
            "student_outside_mass": ranked.student_outside_mass,
            "teacher_outside_mass": ranked.teacher_outside_mass,
        }
        for name, values in on_opener.items():
            if values is not None:
                metrics[name] = _mean_of_means(to_grid(values, opener), opener)
    return metrics


def to_grid(values: Tensor, mask: Tensor) -> Tensor:
    """Values of the mask's True positions (n,), row after row -> (batch, seq), 0 elsewhere."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def _mean_of_means(values: Tensor, mask: Tensor) -> Tensor:
    return (values.where(mask, 0).sum(-1) / mask.sum(-1)).mean()


def _kendall_tau(scores_best_first: Tensor) -> Tensor:
    k = scores_best_first.shape[-1]
    better = (torch.sign(scores_best_first[:, i : i + 1] - scores_best_first[:, i + 1 :]).sum(-1) for i in range(k - 1))
    return torch.stack(list(better)).sum(0) / (k * (k - 1) / 2)
