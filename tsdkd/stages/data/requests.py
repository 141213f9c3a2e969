"""The interface of the engines: requests in, responses out."""

from dataclasses import dataclass
from typing import Literal, TypeVar

FinishReason = Literal["stop", "length", "early"]
"""stop: an end token or a stop string ended the response; length: --max-new-tokens cut it; early: --rollout-tokens."""


@dataclass(frozen=True, slots=True)
class Request:
    """Input for one response. The seed decides the random numbers that it is sampled with."""

    sample_id: str
    prompt_ids: list[int]
    seed: int


@dataclass(frozen=True, slots=True)
class RequestBatch:
    """Requests that an engine samples as one unit. A subclass adds the data that its caller needs."""

    requests: list[Request]


AnyRequestBatch = TypeVar("AnyRequestBatch", bound=RequestBatch)


@dataclass(frozen=True, slots=True)
class Response:
    ids: list[int]
    """As the engine sampled them, with the end token."""
    finish_reason: FinishReason
    replaced: int = 0
    """Number of the student's tokens that the teacher replaced."""
    log_probs: list[float] | None = None
    """Of each id as it was sampled, where the engine was asked for them."""
