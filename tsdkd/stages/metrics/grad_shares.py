"""The share of each term in the gradient of an optimizer step.

A term's gradient is that of the weighted term at the student's final hidden states, over all response tokens of the
step. Its share is the norm of its gradient, divided by the sum of the norms of all terms.
"""

from collections.abc import Mapping
from typing import Any

_NORM, _SQUARE = "_grad_norm", "_grad_square"


def square_grad_norms(metrics: Mapping[str, Any], responses: int) -> dict[str, Any]:
    """A micro-batch's metrics with "TERM_grad_square" in place of the loss's "TERM_grad_norm".

    The means of these squares over all responses of a step are proportional to the step's squared norms: tokens of
    different micro-batches and ranks differ, so their squares add; a micro-batch's weight is its number
    of responses.
    """
    squared = {}
    for name, value in metrics.items():
        if name.endswith(_NORM):
            squared[name.removesuffix(_NORM) + _SQUARE] = responses * value**2
        else:
            squared[name] = value
    return squared


def pop_grad_shares(means: dict[str, float]) -> dict[str, float]:
    """Remove the mean squares from a step's metrics; return "TERM_grad_share" of each term.

    Returns nothing for a single term, and where all gradients are 0.
    """
    terms = [name.removesuffix(_SQUARE) for name in means if name.endswith(_SQUARE)]
    norms = {term: means.pop(f"{term}{_SQUARE}") ** 0.5 for term in terms}
    total = sum(norms.values())
    return {f"{term}_grad_share": norm / total for term, norm in norms.items()} if len(norms) > 1 and total else {}
