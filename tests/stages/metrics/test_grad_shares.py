"""Shares of the gradient: micro-batches of any size give those of the whole step."""

import pytest
import torch

from tsdkd.core.config import TERMS
from tsdkd.stages.metrics.grad_shares import pop_grad_shares, square_grad_norms
from tsdkd.stages.metrics.names import METRICS


def logged(micro_batches: list[tuple[dict[str, torch.Tensor], int]]) -> dict[str, float]:
    """Means over responses, as the trainer forms them, and the shares that follow."""
    total, means = sum(responses for _, responses in micro_batches), {}
    for metrics, responses in micro_batches:
        for name, value in square_grad_norms(metrics, responses).items():
            means[name] = means.get(name, 0.0) + responses * float(value) / total
    shares = pop_grad_shares(means)
    return means | shares


def test_micro_batches_give_the_shares_of_the_step() -> None:
    """Gradients of five responses' tokens, (tokens, width); the loss of a micro-batch is a mean over its responses."""
    generator = torch.Generator().manual_seed(0)
    grads = {"indirect": torch.randn(5, 3, generator=generator), "direct": 4 * torch.randn(5, 3, generator=generator)}
    norms = {term: grad.norm().item() for term, grad in grads.items()}
    for sizes in ([5], [2, 2, 1], [4, 1]):
        parts = zip(*(grad.split(sizes) for grad in grads.values()), strict=True)
        found = logged(
            [
                ({f"{term}_grad_norm": part.norm() / size for term, part in zip(grads, row, strict=True)}, size)
                for row, size in zip(parts, sizes, strict=True)
            ]
        )
        assert found == pytest.approx(
            {f"{term}_grad_share": norm / sum(norms.values()) for term, norm in norms.items()}
        )


def test_other_metrics_stay_and_single_terms_have_no_share() -> None:
    entropy = {"entropy": torch.tensor(2.0), "entropy_grad_norm": torch.tensor(3.0)}
    assert logged([(entropy, 4)]) == {"entropy": 2.0}
    zero = {"direct_grad_norm": torch.tensor(0.0), "entropy_grad_norm": torch.tensor(0.0)}
    assert logged([(zero, 4)]) == {}
    half = {"direct_grad_norm": torch.tensor(0.0), "entropy_grad_norm": torch.tensor(1.0)}
    assert logged([(half, 4)]) == {"direct_grad_share": 0.0, "entropy_grad_share": 1.0}


def test_every_term_has_a_label() -> None:
    assert {f"{term}_grad_share" for term in TERMS} <= METRICS.keys()
