"""The selection rules of `core/selection.py` in numpy, so that inspecting recorded scores loads no torch.

Arrays hold one value per response token. Tests compare both implementations.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np

from tsdkd.core.adaptive_opener import AdaptiveOpener
from tsdkd.core.config import ROUNDING, TSDKDConfig

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True)
class ResponseSelection:
    """Which tokens of one response each term uses; each turn has its own opener and its own most uncertain tokens."""

    opener_fractions: list[float]
    """The fraction c of the entropy that the opener of each turn holds."""
    in_opener: Array
    """Boolean, (tokens,); False without an indirect term."""
    in_entropy_term: Array
    """Boolean, (tokens,)."""
    gate: Array
    """Weights of the divergence, (tokens,); 0 without a direct term."""


def select_tokens(
    student_entropy: Array,
    teacher_entropy: Array,
    lengths: list[int],
    objective: TSDKDConfig,
    opener_fractions: list[float],
) -> ResponseSelection:
    """The tokens that the objective's terms use, in turns of `lengths` tokens; `opener_fractions`: the c of each."""
    gate = gate_weights(student_entropy, teacher_entropy, objective.tau)
    if not objective.gate:
        gate = np.ones_like(gate)
    turns = split_turns(student_entropy, lengths)
    uncertain = np.concatenate([top_entropy_mask(turn, objective.em_ratio) for turn in turns])
    openers = [
        np.arange(len(turn)) < (opener_length(turn, fraction) if objective.alpha else 0)
        for turn, fraction in zip(turns, opener_fractions, strict=True)
    ]
    return ResponseSelection(
        opener_fractions,
        np.concatenate(openers),
        uncertain if objective.em_weight else np.zeros_like(uncertain),
        gate if objective.direct_weight else np.zeros_like(gate),
    )


def split_turns(values: Array, lengths: list[int]) -> list[Array]:
    """Values of all tokens of turns, by turn."""
    return np.split(values, np.cumsum(lengths)[:-1])


def opener_length(student_entropy: Array, fraction: float) -> int:
    """Tokens of the shortest prefix that holds `fraction` of the entropy; all tokens for a fraction of 1."""
    cumulated = student_entropy.astype(np.float64).cumsum()
    reached = cumulated >= fraction * cumulated[-1] * (1 - ROUNDING)
    return int(reached.argmax()) + 1 if fraction < 1 and reached.any() else len(student_entropy)


def top_entropy_mask(student_entropy: Array, ratio: float) -> Array:
    """Mask of the `max(1, ceil(ratio * tokens))` most uncertain tokens; earlier tokens win ties."""
    count = max(1, ceil(len(student_entropy) * ratio * (1 - ROUNDING)))
    mask = np.zeros(len(student_entropy), dtype=bool)
    mask[np.argsort(-student_entropy, kind="stable")[:count]] = True
    return mask


def gate_weights(student_entropy: Array, teacher_entropy: Array, tau: float) -> Array:
    """sigma_tau(H(student) - H(teacher)), computed without overflow."""
    weights: Array = np.exp(-np.logaddexp(0, (teacher_entropy.astype(np.float64) - student_entropy) / tau))
    return weights


def entropy_gap(student_entropy: Array, teacher_entropy: Array) -> float:
    """Mean student entropy minus mean teacher entropy, in nats per token."""
    return float(student_entropy.mean(dtype=np.float64) - teacher_entropy.mean(dtype=np.float64))


def opener_fraction_chooser(objective: TSDKDConfig) -> Callable[[Array, Array], float]:
    """A function that returns the opener's c of each next response, given (student_entropy, teacher_entropy).

    For an adaptive opener the function keeps the state of earlier responses.
    """
    opener, adaptive = objective.opener, AdaptiveOpener()
    if opener != "adaptive":
        return lambda *_: opener
    return lambda student, teacher: adaptive.update([float(1 / (1 + np.exp(-entropy_gap(student, teacher))))])[0]


def ranks_of_first(ranks: Array, k: int) -> Array:
    """Rank the student's first k candidates among themselves: teacher's ranks (tokens, n) -> (tokens, k)."""
    reranked: Array = ranks[:, :k].argsort(axis=-1).argsort(axis=-1)
    return reranked


def kendall_tau(ranks: Array) -> Array:
    """Agreement of the teacher's and the student's order: ranks (tokens, k) -> (tokens,), 1 equal, -1 reversed."""
    k = ranks.shape[-1]
    pairs = (np.sign(ranks[:, i + 1 :] - ranks[:, i : i + 1]).sum(-1) for i in range(k - 1))
    agreement: Array = np.sum(list(pairs), axis=0) / (k * (k - 1) / 2)
    return agreement
