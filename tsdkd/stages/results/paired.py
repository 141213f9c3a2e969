"""The paired difference of two models on the same documents, with its test."""

from dataclasses import dataclass
from math import sqrt

import numpy as np

RESAMPLES = 10_000


@dataclass(frozen=True, slots=True)
class Difference:
    """A model minus the baseline, on the documents that both have."""

    value: float
    stderr: float
    p: float
    """Two-sided: McNemar's exact test when all scores are 0 or 1, else a paired bootstrap."""
    wins: int
    """Documents on which the model scores higher."""
    losses: int
    """Documents on which the baseline scores higher."""
    documents: int


def paired_difference(scores: np.ndarray, baseline: np.ndarray, weights: np.ndarray) -> Difference:
    """The difference of two models' weighted means; all arrays are (documents,), with the same documents."""
    gains: np.ndarray = scores - baseline
    value = float((weights * gains).sum() / weights.sum())
    spread = float(np.square(weights * (gains - value)).sum()) * len(gains) / max(len(gains) - 1, 1)
    wins, losses = int((gains > 0).sum()), int((gains < 0).sum())
    binary = set(np.unique(np.concatenate([scores, baseline])).tolist()) <= {0.0, 1.0}
    p = _mcnemar_p(wins, losses) if binary else _bootstrap_p(gains, weights)
    return Difference(value, sqrt(spread) / float(weights.sum()), p, wins, losses, len(gains))


def _mcnemar_p(wins: int, losses: int) -> float:
    """The two-sided tail of Binomial(wins + losses, 1/2), in exact integers."""
    trials = wins + losses
    tail = ways = 1  # ways of i successes, each computed from the one before: there may be a hundred thousand trials
    for i in range(min(wins, losses)):
        ways = ways * (trials - i) // (i + 1)
        tail += ways
    return min(1.0, 2 * tail / (1 << trials))


def _bootstrap_p(gains: np.ndarray, weights: np.ndarray) -> float:
    """Twice the fraction of resamples of the documents whose mean gain has the other sign."""
    counts = np.random.default_rng(0).multinomial(len(gains), np.full(len(gains), 1 / len(gains)), size=RESAMPLES)
    means = counts @ (weights * gains)
    other_sign = min(int((means <= 0).sum()), int((means >= 0).sum()))
    return min(1.0, 2 * (other_sign + 1) / (RESAMPLES + 1))
