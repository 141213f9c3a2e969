"""From prompts to the parts of a rollouts artifact: which prompts stay, who answers each, with which seed.

A first pass counts; later ones form the parts, one at a time. A part has one author, and what is in it depends on
prompts, configuration and seed alone.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from tsdkd.artifacts import digest
from tsdkd.stages.config import GenerateConfig
from tsdkd.stages.models import chat_ids
from tsdkd.stages.rollouts.prompts import Prompt, Prompts

AUTHORS = {
    "student": ("student",),
    "teacher": ("teacher",),
    "mixed": ("student", "teacher"),
    "speculative": ("both",),
    "teacher-mixed": ("mixture",),
}
"""Who writes a response, by policy."""
TOGETHER = ("both", "mixture")
"""Authors that are two models, token by token."""


@dataclass(frozen=True, slots=True)
class Job:
    """One response to be sampled, with random numbers of its own."""

    sample_id: str
    prompt: Prompt
    prompt_ids: list[int]
    seed: int


@dataclass(frozen=True, slots=True)
class Part:
    file: str
    author: str
    jobs: list[Job]


@dataclass(frozen=True, slots=True)
class Response:
    ids: list[int]
    """As the engine produced them, end token included."""
    replaced: int = 0
    """How many of the tokens the teacher chose in the student's place."""


class Engine(Protocol):
    def answer(self, parts: Iterator[Part], advance: Callable[[int], None]) -> Iterator[tuple[Part, list[Response]]]:
        """Every part with its responses in the jobs' order, as they finish; `advance` is called with responses done.

        The same part gets the same responses, whatever came before it.
        """


@dataclass(frozen=True, slots=True)
class Census:
    """What a first pass found."""

    prompts: Counter[str]
    """By author."""
    left_out: Counter[str]
    """By reason: "empty", "repeated", "too_long"."""
    longest: int
    """Tokens of the longest prompt that stays."""


@dataclass(frozen=True, slots=True)
class Jobs:
    prompts: Prompts
    tokenizer: PreTrainedTokenizerBase
    config: GenerateConfig
    part_size: int
    seed: int

    def count(self) -> Census:
        """Raises InputError for prompts that cannot be read."""
        counted, left_out, longest = Counter[str](), Counter[str](), 0
        for prompt, ids in self._fitting(left_out):
            counted[self._author(prompt)] += 1
            longest = max(longest, len(ids))
        return Census(counted, left_out, longest)

    def parts(self, author: str, census: Census) -> Iterator[Part]:
        """An author's parts in order; the student's come before the teacher's."""
        first = 0
        for earlier in AUTHORS[self.config.policy]:
            if earlier == author:
                break
            first += -(-census.prompts[earlier] * self.config.samples_per_prompt // self.part_size)
        jobs = self._jobs(author)
        while some := list(islice(jobs, self.part_size)):
            yield Part(f"part-{first:05d}.parquet", author, some)
            first += 1

    def _jobs(self, author: str) -> Iterator[Job]:
        for prompt, ids in self._fitting(Counter()):
            if self._author(prompt) == author:
                for n in range(self.config.samples_per_prompt):
                    sample_id = f"{prompt.prompt_id}-{n}"
                    yield Job(sample_id, prompt, ids, int(digest([self.seed, sample_id])[:15], 16))

    def _fitting(self, left_out: Counter[str]) -> Iterator[tuple[Prompt, list[int]]]:
        for prompt in self.prompts.read(left_out):
            ids = chat_ids(self.tokenizer, prompt.messages)
            if len(ids) <= self.config.max_prompt_tokens:
                yield prompt, ids
            else:
                left_out["too_long"] += 1

    def _author(self, prompt: Prompt) -> str:
        """With the policy "mixed" a draw of the prompt's own decides: more lambda only adds to the student's."""
        if self.config.policy != "mixed":
            return AUTHORS[self.config.policy][0]
        draw = int(digest([self.seed, prompt.prompt_id])[:13], 16) / 16**13
        return "student" if draw < self.config.student_share else "teacher"
