"""The rules of `core/selection.py` for one response, on numpy: looking at what is recorded loads no torch.

Arrays run over the response's tokens. Tests hold both equal.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np

from tsdkd.core.adaptive import AdaptiveOpener
from tsdkd.core.config import ROUNDING, TSDKDConfig

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True)
class Selection:
    """What of a response is taught, and how much."""

    fraction: float
    """The share c of the entropy that the opener was to hold."""
    opener: int
    """Tokens of the opener; 0 without a ranking term."""
    uncertain: Array
    """Is entropy minimised here?"""
    gate: Array


def select(student: Array, teacher: Array, objective: TSDKDConfig, fraction: float) -> Selection:
    """By the objective's terms, from both models' entropies.

    `fraction` is the opener's c, chosen for this response where it is adaptive.
    """
    weight = gate(student, teacher, objective.tau) if objective.gate else np.ones(len(student))
    uncertain = top_entropy(student, objective.em_ratio)
    return Selection(
        fraction,
        opener_length(student, fraction) if objective.alpha else 0,
        uncertain if objective.em_weight else np.zeros_like(uncertain),
        weight if objective.direct_weight else np.zeros_like(weight),
    )


def opener_length(student: Array, fraction: float) -> int:
    """Tokens of the shortest beginning that holds `fraction` of the entropy; all of them where it is 1."""
    cumulated = student.astype(np.float64).cumsum()
    reached = cumulated >= fraction * cumulated[-1] * (1 - ROUNDING)
    return int(reached.argmax()) + 1 if fraction < 1 and reached.any() else len(student)


def top_entropy(student: Array, ratio: float) -> Array:
    """Is a position among the `max(1, ceil(ratio * L))` most uncertain? Of equals, the earlier."""
    count = max(1, ceil(len(student) * ratio * (1 - ROUNDING)))
    chosen = np.zeros(len(student), dtype=bool)
    chosen[np.argsort(-student, kind="stable")[:count]] = True
    return chosen


def gate(student: Array, teacher: Array, tau: float) -> Array:
    """sigma_tau(H(student) - H(teacher)), without overflow."""
    weights: Array = np.exp(-np.logaddexp(0, (teacher.astype(np.float64) - student) / tau))
    return weights


def gap(student: Array, teacher: Array) -> float:
    """By how much the student is less sure than the teacher, mean nats a token."""
    return float(student.mean(dtype=np.float64) - teacher.mean(dtype=np.float64))


def fraction_chooser(objective: TSDKDConfig) -> Callable[[Array, Array], float]:
    """What gives the opener's c of one response after the other, from their entropies (student's, teacher's)."""
    opener, adaptive = objective.opener, AdaptiveOpener()
    if opener != "adaptive":
        return lambda *_: opener
    return lambda student, teacher: adaptive.choose([float(1 / (1 + np.exp(-gap(student, teacher))))])[0]


def first_ranks(ranks: Array, k: int) -> Array:
    """The teacher's ranks (tokens, n) of the student's candidates -> those among its k best alone (tokens, k)."""
    among: Array = ranks[:, :k].argsort(axis=-1).argsort(axis=-1)
    return among


def kendall_tau(ranks: Array) -> Array:
    """Agreement of two orders: ranks (tokens, k) of items in the other order -> 1 (the same) to -1 (tokens,)."""
    k = ranks.shape[-1]
    pairs = (np.sign(ranks[:, i + 1 :] - ranks[:, i : i + 1]).sum(-1) for i in range(k - 1))
    agreement: Array = np.sum(list(pairs), axis=0) / (k * (k - 1) / 2)
    return agreement
