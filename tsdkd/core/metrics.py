"""The objective, eq. (13): three per-token losses, weighted by the selection, averaged over responses."""

import torch
from torch import Tensor

from tsdkd.core.selection import TokenWeights


@torch.no_grad()
def loss_metrics(
    student_entropy: Tensor,
    teacher_entropy: Tensor,
    agreement: Tensor,
    weights: TokenWeights,
    response_mask: Tensor,
    terms: dict[str, Tensor],
    scores: Tensor | None,
) -> dict[str, Tensor]:
    """The metrics of `token_selective_loss`, from values of response tokens (tokens,).

    `scores`: the student's logits at its candidates on the opener (n, k), the teacher's favourite first.
    """
    opener = weights.ranking > 0
    metrics = {name: term.detach() for name, term in terms.items()}
    for name, values in (
        ("student_entropy", student_entropy),
        ("teacher_entropy", teacher_entropy),
        ("top1_agreement", agreement),
    ):
        metrics[name] = _mean_of_means(to_grid(values, response_mask), response_mask)
    metrics["gate"] = _mean_of_means(weights.gate, response_mask)
    metrics["opener_length"] = opener.sum() / len(response_mask)
    metrics["response_length"] = response_mask.sum() / len(response_mask)
    if scores is not None and len(scores):
        metrics["rank_agreement"] = _mean_of_means(to_grid(_kendall_tau(scores), opener), opener)
    return metrics


def to_grid(tokens: Tensor, mask: Tensor) -> Tensor:
    """Values of the mask's True positions (n,), row after row -> (batch, seq), 0 elsewhere."""
    return tokens.new_zeros(mask.shape).masked_scatter(mask, tokens)


def _mean_of_means(values: Tensor, mask: Tensor) -> Tensor:
    return (values.where(mask, 0).sum(-1) / mask.sum(-1)).mean()


def _kendall_tau(scores_best_first: Tensor) -> Tensor:
    k = scores_best_first.shape[-1]
    better = (torch.sign(scores_best_first[:, i : i + 1] - scores_best_first[:, i + 1 :]).sum(-1) for i in range(k - 1))
    return torch.stack(list(better)).sum(0) / (k * (k - 1) / 2)
