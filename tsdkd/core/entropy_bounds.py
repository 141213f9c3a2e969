"""The entropy of a distribution of which only the K most likely tokens are known."""

from torch import Tensor

MIN_TAIL = 1e-6
"""Less probability outside the K tokens is rounding."""
UPPER_WEIGHT = 0.4
"""Where the estimate lies between the bounds; docs/decisions.md has the measurement."""


def entropy_bounds(top_log_probs: Tensor, vocab: int) -> tuple[Tensor, Tensor]:
    """The least and the greatest entropy over `vocab` tokens: log-probabilities (..., K), best first -> nats (...).

    Each other token has at most the probability p of the K-th. Entropy is concave, so it is least where as many of them
    as possible have p, one has the rest and all others have 0; it is greatest where all have the same probability.
    """
    probs = top_log_probs.exp()
    known = (probs * -top_log_probs).sum(-1)
    tail = 1 - probs.sum(-1)
    tail = tail.where(tail > MIN_TAIL, 0)
    others = max(vocab - top_log_probs.shape[-1], 1)  # 1: the K are all tokens, and the tail is rounding
    greatest = tail * (others / tail.clamp(min=MIN_TAIL)).log()
    largest = probs[..., -1].maximum(tail / others).clamp(min=MIN_TAIL / vocab)
    full = (tail / largest).floor()
    rest = (tail - full * largest).clamp(min=0)
    least = full * largest * -largest.log() + rest * -rest.clamp(min=1e-30).log()
    return known + least.minimum(greatest), known + greatest


def estimated_entropy(least: Tensor, greatest: Tensor) -> Tensor:
    """The entropy that stands for the exact one between its bounds."""
    return least + UPPER_WEIGHT * (greatest - least)
