"""From prompts to the parts of a rollouts artifact: which prompts stay, who answers each, with which seed.

A first pass counts; later ones form the parts, one at a time. A part has one author, and what is in it depends on
prompts, configuration and seed alone.
"""

from dataclasses import dataclass

from tsdkd.stages.data.prompts import Prompt


@dataclass(frozen=True, slots=True)
class Request:
    """One response to be sampled, with random numbers of its own."""

    sample_id: str
    prompt: Prompt
    prompt_ids: list[int]
    seed: int


@dataclass(frozen=True, slots=True)
class RequestBatch:
    file: str
    author: str
    requests: list[Request]


@dataclass(frozen=True, slots=True)
class Response:
    ids: list[int]
    """As the engine produced them, end token included."""
    replaced: int = 0
    """How many of the tokens the teacher chose in the student's place."""
