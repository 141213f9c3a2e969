"""Requests from prompts: each prompt's authorship and seeds, and the part of the rollouts that its responses belong to.

A first pass over the prompts counts them, later passes form the parts. One part is in memory at a time. Prompts, config
and seed alone decide the content of a part.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from tsdkd.stages.config.generate import AUTHORS, GenerateConfig
from tsdkd.stages.data.prompt_tokens import prompt_token_ids
from tsdkd.stages.data.prompts import Prompt, Prompts
from tsdkd.stages.data.randomness import random_integer, random_uniform
from tsdkd.stages.data.requests import Request, RequestBatch


class Authorship(NamedTuple):
    """The models that write a response. The student's come first in order, then the teachers' by name."""

    author: str
    teacher: str = ""
    """The name of the teacher that writes or takes part; "" for the student alone, and for an only teacher."""


@dataclass(frozen=True, slots=True)
class PromptCounts:
    """Prompts that a first pass counted."""

    by_authorship: Counter[Authorship]
    by_teacher: Counter[str]
    """By the name of the prompt's teacher, whoever responds."""
    skipped: Counter[str]
    """By reason: "empty", "duplicate", "too_long"."""
    longest: int
    """Tokens of the longest prompt that is not skipped."""
    largest_id: int
    """The largest token id of these prompts."""

    @property
    def total(self) -> int:
        """Prompts that are not skipped."""
        return self.by_authorship.total()


@dataclass(frozen=True, slots=True)
class RolloutPart(RequestBatch):
    """Requests with one authorship, whose responses become one file of the rollouts."""

    file: str
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
        by_authorship, by_teacher, skipped = Counter[Authorship](), Counter[str](), Counter[str]()
        longest, largest_id = 0, 0
        for prompt, ids in self._tokenized_prompts(skipped):
            by_authorship[self._authorship(prompt)] += 1
            by_teacher[prompt.teacher] += 1
            longest, largest_id = max(longest, len(ids)), max(largest_id, *ids)
        return PromptCounts(by_authorship, by_teacher, skipped, longest, largest_id)

    def parts(self, authorship: Authorship, counts: PromptCounts) -> Iterator[RolloutPart]:
        """The parts of one authorship; they are numbered in the order of authorships."""
        number = sum(
            -(-count * self.config.samples_per_prompt // self.part_size)
            for earlier, count in counts.by_authorship.items()
            if earlier < authorship
        )
        requests = self._requests(authorship)
        while chunk := list(islice(requests, self.part_size)):
            yield RolloutPart(
                [request for request, _ in chunk],
                file=f"part-{number:05d}.parquet",
                prompts=[prompt for _, prompt in chunk],
            )
            number += 1

    def _requests(self, authorship: Authorship) -> Iterator[tuple[Request, Prompt]]:
        for prompt, ids in self._tokenized_prompts(Counter(), authorship):
            for n in range(self.config.samples_per_prompt):
                sample_id = f"{prompt.prompt_id}-{n}"
                yield Request(sample_id, ids, random_integer(self.seed, sample_id)), prompt

    def _tokenized_prompts(
        self, skipped: Counter[str], authorship: Authorship | None = None
    ) -> Iterator[tuple[Prompt, list[int]]]:
        """Prompts of at most `max_prompt_tokens` with their ids; counts the others in `skipped`.

        authorship: None for all prompts.
        """
        for prompt in self.prompts.read(skipped):
            if authorship not in {None, self._authorship(prompt)}:
                continue
            ids = prompt_token_ids(self.tokenizer, prompt, self.day, self.config.max_prompt_tokens)
            if not ids:
                skipped["empty"] += 1
            elif len(ids) <= self.config.max_prompt_tokens:
                yield prompt, ids
            else:
                skipped["too_long"] += 1

    def _authorship(self, prompt: Prompt) -> Authorship:
        """The authorship of a prompt's responses.

        With the policy "mixed", prompt and seed decide: a larger student fraction only adds prompts to the student's.
        """
        author, *others = AUTHORS[self.config.policy]
        if others and random_uniform(self.seed, prompt.prompt_id) >= self.config.student_fraction:
            author = others[0]
        return Authorship(author, "" if author == "student" else prompt.teacher)
