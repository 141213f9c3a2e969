"""What a server is asked about a sequence, and what it answers: the form that all routes share."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain
from math import isfinite, isnan

import torch
from torch import Tensor

from tsdkd.errors import TsdkdError

ROUNDING = 0.01
"""How far the sum of probabilities may exceed 1."""
SPARE = 4
"""Log-probabilities beyond the K that are kept: some tokens of a padded vocabulary are unknown to the student."""
UNKNOWN = float("nan")
"""The log-probability of a candidate that the server does not give."""

LogProbs = dict[int, float]
"""Log-probabilities by token id."""


@dataclass(frozen=True, slots=True)
class ReadRequest:
    """A sequence, and the tokens of it whose predictions are read."""

    ids: list[int]
    positions: list[int]
    """Indices of `ids`, ascending, at least 1."""
    candidates: list[list[int]] = field(default_factory=list)
    """The student's candidates at each position; empty: none are ranked."""


@dataclass(frozen=True, slots=True)
class RawReading:
    """The answer of a route, before it is checked."""

    rows: list[LogProbs]
    """At each position: the server's most likely tokens; it may also hold the token itself."""
    token_log_probs: list[float]
    candidate_log_probs: list[list[float]] | None = None
    """At each position, in the order of the request; None where the route gives no log-probabilities of fixed ids."""
    next_row: LogProbs = field(default_factory=dict)
    """The most likely tokens after the sequence, where they were asked for."""


@dataclass(frozen=True, slots=True)
class Reading:
    """The teacher's log-probabilities at the positions of a request, at temperature 1."""

    top_ids: Tensor
    """(tokens, K), most likely first"""
    top_log_probs: Tensor
    """(tokens, K)"""
    token_log_probs: Tensor
    """Of the sequence's own tokens (tokens,)."""
    candidate_log_probs: Tensor
    """(tokens, k), `UNKNOWN` outside the top K where the route gives no log-probabilities of fixed ids."""


def check_reading(request: ReadRequest, raw: RawReading, asked: int, top_k: int, vocab: int) -> Reading:
    """The K most likely of the `vocab` ids that the student knows, and the candidates' log-probabilities.

    `asked`: log-probabilities that the server was asked for at each position, at least K.

    Raises TsdkdError for an answer with fewer log-probabilities than asked, NaN, or a sum of probabilities above 1.
    """
    if not len(raw.rows) == len(raw.token_log_probs) == len(request.positions):
        raise _wrong(f"log-probabilities of {len(raw.rows)} tokens, not of {len(request.positions)}")
    tops = [_top(row, asked, top_k, vocab) for row in raw.rows]
    require_finite(raw.token_log_probs)
    candidates = raw.candidate_log_probs
    if candidates is None:
        pairs = zip(tops, request.candidates or [[]] * len(tops), strict=True)
        candidates = [[top.get(token, UNKNOWN) for token in proposed] for top, proposed in pairs]
    elif any(map(isnan, chain.from_iterable(candidates))):
        raise _not_finite()
    return Reading(
        top_ids=torch.tensor([list(top) for top in tops], dtype=torch.long).reshape(-1, top_k),
        top_log_probs=torch.tensor([list(top.values()) for top in tops]).reshape(-1, top_k),
        token_log_probs=torch.tensor(raw.token_log_probs),
        candidate_log_probs=torch.tensor(candidates),
    )


def require_finite(log_probs: Iterable[float]) -> None:
    """Raises TsdkdError for a log-probability that is NaN or infinite."""
    if not all(map(isfinite, log_probs)):
        raise _not_finite()


def _top(row: LogProbs, asked: int, top_k: int, vocab: int) -> LogProbs:
    if len(row) < asked:
        raise _wrong(f"{len(row)} log-probabilities of a token where {asked} were asked for")
    require_finite(row.values())
    values = torch.tensor(list(row.values()))
    if (total := float(values.exp().sum())) > 1 + ROUNDING:
        raise _wrong(f"probabilities that sum to {total:.3g}")
    known = sorted(((value, token) for token, value in row.items() if token < vocab), key=lambda pair: -pair[0])
    if len(known) < top_k:
        raise TsdkdError(
            f"Of the server's {asked} most likely tokens, the student knows only {len(known)}; {top_k} are recorded.",
            "Give a smaller --top-k.",
        )
    return {token: value for value, token in known[:top_k]}


def teacher_ranks(candidate_log_probs: Tensor) -> Tensor:
    """The teacher's ranks of candidates (tokens, k), 0 is the most likely; unknown ones come last, in their order."""
    known = candidate_log_probs.nan_to_num(nan=-torch.inf)
    return known.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)


def _not_finite() -> TsdkdError:
    return _wrong("a log-probability that is no finite number")


def _wrong(what: str) -> TsdkdError:
    return TsdkdError(
        f"The teacher's server answers with {what}.", "Check its options and its version; it must be vLLM or SGLang."
    )
