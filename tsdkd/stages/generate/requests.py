"""Requests from prompts: each prompt's author and seeds, and the part of the rollouts that its responses belong to.

A first pass over the prompts counts them, later passes form the parts. One part is in memory at a time. Prompts, config
and seed alone decide the content of a part.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from transformers import PreTrainedTokenizerBase

from tsdkd.stages.config.generate import AUTHORS, GenerateConfig
from tsdkd.stages.data.prompt_tokens import prompt_token_ids
from tsdkd.stages.data.prompts import Prompt, Prompts
from tsdkd.stages.data.randomness import random_integer, random_uniform
from tsdkd.stages.data.requests import Request, RequestBatch


@dataclass(frozen=True, slots=True)
class PromptCounts:
    """Prompts that a first pass counted."""

    by_author: Counter[str]
    skipped: Counter[str]
    """By reason: "empty", "duplicate", "too_long"."""
    longest: int
    """Tokens of the longest prompt that is not skipped."""
    largest_id: int
    """The largest token id of these prompts."""

    @property
    def total(self) -> int:
        """Prompts that are not skipped."""
        return self.by_author.total()


@dataclass(frozen=True, slots=True)
class RolloutPart(RequestBatch):
    """Requests with one author, whose responses become one file of the rollouts."""

    file: str
    author: str
    prompts: list[Prompt]
    """The prompt of each request."""


@dataclass(frozen=True, slots=True)
class PromptRequests:
    """The requests of one run of `generate`."""

    prompts: Prompts
    tokenizer: PreTrainedTokenizerBase
    config: GenerateConfig
    part_size: int
    """Requests per part."""
    seed: int
    day: str | None = None
    """The day that the chat template writes."""

    def count(self) -> PromptCounts:
        """Count the prompts. Raises InputError for prompts that cannot be read."""
        by_author, skipped, longest, largest_id = Counter[str](), Counter[str](), 0, 0
        for prompt, ids in self._tokenized_prompts(skipped):
            by_author[self._author(prompt)] += 1
            longest, largest_id = max(longest, len(ids)), max(largest_id, *ids)
        return PromptCounts(by_author, skipped, longest, largest_id)

    def parts(self, author: str, counts: PromptCounts) -> Iterator[RolloutPart]:
        """The parts of one author, in order; the student's are numbered before the teacher's."""
        number = 0
        for earlier in AUTHORS[self.config.policy]:
            if earlier == author:
                break
            number += -(-counts.by_author[earlier] * self.config.samples_per_prompt // self.part_size)
        requests = self._requests(author)
        while chunk := list(islice(requests, self.part_size)):
            yield RolloutPart(
                [request for request, _ in chunk],
                file=f"part-{number:05d}.parquet",
                author=author,
                prompts=[prompt for _, prompt in chunk],
            )
            number += 1

    def _requests(self, author: str) -> Iterator[tuple[Request, Prompt]]:
        for prompt, ids in self._tokenized_prompts(Counter()):
            if self._author(prompt) == author:
                for n in range(self.config.samples_per_prompt):
                    sample_id = f"{prompt.prompt_id}-{n}"
                    yield Request(sample_id, ids, random_integer(self.seed, sample_id)), prompt

    def _tokenized_prompts(self, skipped: Counter[str]) -> Iterator[tuple[Prompt, list[int]]]:
        """Prompts of at most `max_prompt_tokens` with their ids; counts the others in `skipped`."""
        for prompt in self.prompts.read(skipped):
            ids = prompt_token_ids(self.tokenizer, prompt, self.day, self.config.max_prompt_tokens)
            if not ids:
                skipped["empty"] += 1
            elif len(ids) <= self.config.max_prompt_tokens:
                yield prompt, ids
            else:
                skipped["too_long"] += 1

    def _author(self, prompt: Prompt) -> str:
        """The author of a prompt's responses.

        With the policy "mixed", prompt and seed decide: a larger student fraction only adds prompts to the student's.
        """
        if self.config.policy != "mixed":
            return AUTHORS[self.config.policy][0]
        by_student = random_uniform(self.seed, prompt.prompt_id) < self.config.student_fraction
        return "student" if by_student else "teacher"
