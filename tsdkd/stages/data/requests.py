"""The interface of the engines: requests in, responses out."""

from dataclasses import dataclass
from typing import TypeVar


@dataclass(frozen=True, slots=True)
class Request:
    """One response to sample. The seed decides its random numbers."""

    sample_id: str
    prompt_ids: list[int]
    seed: int


@dataclass(frozen=True, slots=True)
class RequestBatch:
    """Requests that an engine samples as one unit. A subclass carries what its caller needs beside the responses."""

    requests: list[Request]


AnyRequestBatch = TypeVar("AnyRequestBatch", bound=RequestBatch)


@dataclass(frozen=True, slots=True)
class Response:
    ids: list[int]
    """As the engine sampled them, with the end token."""
    replaced: int = 0
    """Number of tokens that the teacher sampled in the student's place."""
