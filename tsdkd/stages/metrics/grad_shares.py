"""The share of each term in the gradient of an optimizer step.

A term's gradient is that of the weighted term at the student's final hidden states, over all response tokens of the
step. Its share is the norm of its gradient, divided by the sum of the norms of all terms.
"""

from collections.abc import Mapping
from typing import Any

from tsdkd.core.config import TERMS


def square_grad_norms(metrics: Mapping[str, Any], responses: int) -> dict[str, Any]:
    """A micro-batch's metrics with "TERM_grad_square" in place of the loss's "TERM_grad_norm".

    The means of these squares over all responses of a step are proportional to the step's squared norms: tokens of
    different micro-batches and ranks differ, so their squares add; a micro-batch's weight is its number
    of responses.
    """
    norms = {f"{term}_grad_norm": f"{term}_grad_square" for term in TERMS}
    squares = {norms[name]: responses * value**2 for name, value in metrics.items() if name in norms}
    return {name: value for name, value in metrics.items() if name not in norms} | squares


def pop_grad_shares(means: dict[str, float]) -> dict[str, float]:
    """Remove the mean squares from a step's metrics; return "TERM_grad_share" of each term.

    Returns nothing for a single term, and where all gradients are 0.
    """
    squares = {term: means.pop(f"{term}_grad_square", None) for term in TERMS}
    norms = {term: square**0.5 for term, square in squares.items() if square is not None}
    total = sum(norms.values())
    return {f"{term}_grad_share": norm / total for term, norm in norms.items()} if len(norms) > 1 and total else {}
