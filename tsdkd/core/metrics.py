"""The metrics that the loss reports beside its value: means over responses."""

import torch
from torch import Tensor


@torch.no_grad()
def loss_metrics(
    terms: dict[str, Tensor],
    means: dict[str, Tensor | None],
    opener: Tensor,
    response_mask: Tensor,
    candidate_logits: Tensor | None,
) -> dict[str, Tensor]:
    """The metrics of `token_selective_loss`, detached scalars.

    Args:
        terms: the unweighted terms.
        means: values (tokens,), by the name of the metric that is their mean; None for unknown values.
        opener: bool (batch, seq).
        response_mask: bool (batch, seq).
        candidate_logits: the student's logits of its candidates on the opener (n, k), in the teacher's order; None
            without an indirect term.
    """
    metrics = {name: term.detach() for name, term in terms.items()}
    for name, values in means.items():
        if values is not None:
            metrics[name] = _mean_of_means(to_grid(values, response_mask), response_mask)
    metrics["opener_length"] = opener.sum() / len(response_mask)
    metrics["response_length"] = response_mask.sum() / len(response_mask)
    if candidate_logits is not None and len(candidate_logits):
        metrics["rank_agreement"] = _mean_of_means(to_grid(_kendall_tau(candidate_logits), opener), opener)
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
