"""From prompts to the parts of a rollouts artifact: which prompts stay, who answers each, with which seed."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from transformers import PreTrainedTokenizerBase

from tsdkd.stages.config.generate import AUTHORS, GenerateConfig
from tsdkd.stages.data.prompts import Prompt, Prompts
from tsdkd.stages.data.randomness import random_integer, random_uniform
from tsdkd.stages.data.requests import Request, RequestBatch
from tsdkd.stages.models.tokenizers import chat_token_ids


@dataclass(frozen=True, slots=True)
class PromptCounts:
    """What a first pass found."""

    prompts: Counter[str]
    """By author."""
    left_out: Counter[str]
    """By reason: "empty", "repeated", "too_long"."""
    longest: int
    """Tokens of the longest prompt that stays."""


@dataclass(frozen=True, slots=True)
class RolloutPart(RequestBatch):
    """Requests with one author, whose responses become one file of the rollouts."""

    file: str
    author: str
    prompts: list[Prompt]
    """The prompt of each request."""


@dataclass(frozen=True, slots=True)
class PromptRequests:
    prompts: Prompts
    tokenizer: PreTrainedTokenizerBase
    config: GenerateConfig
    part_size: int
    seed: int

    def count(self) -> PromptCounts:
        """Raises InputError for prompts that cannot be read."""
        counted, left_out, longest = Counter[str](), Counter[str](), 0
        for prompt, ids in self._fitting(left_out):
            counted[self._author(prompt)] += 1
            longest = max(longest, len(ids))
        return PromptCounts(counted, left_out, longest)

    def parts(self, author: str, census: PromptCounts) -> Iterator[RolloutPart]:
        """An author's parts in order; the student's come before the teacher's."""
        first = 0
        for earlier in AUTHORS[self.config.policy]:
            if earlier == author:
                break
            first += -(-census.prompts[earlier] * self.config.samples_per_prompt // self.part_size)
        requests = self._requests(author)
        while chunk := list(islice(requests, self.part_size)):
            yield RolloutPart(
                [request for request, _ in chunk],
                file=f"part-{first:05d}.parquet",
                author=author,
                prompts=[prompt for _, prompt in chunk],
            )
            first += 1

    def _requests(self, author: str) -> Iterator[tuple[Request, Prompt]]:
        for prompt, ids in self._fitting(Counter()):
            if self._author(prompt) == author:
                for n in range(self.config.samples_per_prompt):
                    sample_id = f"{prompt.prompt_id}-{n}"
                    yield Request(sample_id, ids, random_integer(self.seed, sample_id)), prompt

    def _fitting(self, left_out: Counter[str]) -> Iterator[tuple[Prompt, list[int]]]:
        for prompt in self.prompts.read(left_out):
            ids = chat_token_ids(self.tokenizer, prompt.messages)
            if len(ids) <= self.config.max_prompt_tokens:
                yield prompt, ids
            else:
                left_out["too_long"] += 1

    def _author(self, prompt: Prompt) -> str:
        """With the policy "mixed" a draw of the prompt's own decides: more lambda only adds to the student's."""
        if self.config.policy != "mixed":
            return AUTHORS[self.config.policy][0]
        by_student = random_uniform(self.seed, prompt.prompt_id) < self.config.student_fraction
        return "student" if by_student else "teacher"
