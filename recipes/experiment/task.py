"""A family of generated problems with one token per character, and the models that are trained on it from scratch."""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

END = "<end>"


@dataclass(frozen=True)
class Shape:
    """A model and its training from scratch."""

    width: int
    inner: int
    layers: int
    rate: float
    """Peak learning rate."""
    steps: int
    """Maximum number of steps."""
    batch: int = 32
    every: int = 10
    """Steps between evaluations."""


@dataclass(frozen=True)
class Task:
    """Problems with one answer each and many solutions."""

    name: str
    letters: str
    """All characters of problems and solutions."""
    response_tokens: int
    """The most tokens of a response; solutions are shorter."""
    context: int
    """The most tokens of a problem and its response together."""
    draw_problem: Callable[[random.Random], str]
    solution: Callable[[str, random.Random], str]
    """A solution whose free choices the generator makes; all solutions have the same length."""
    answer: Callable[[str], str]
    teacher: Shape
    student: Shape
    beginnings: Sequence[str] = ("",)
    """The first characters of solutions, over all of which accuracy is measured while the models are made."""

    def problems(self, seed: int, without: Iterable[str] = ()) -> Iterator[str]:
        """Yield distinct problems that are not in `without`, endlessly."""
        generator, seen = random.Random(seed), set(without)
        while True:
            problem = self.draw_problem(generator)
            if problem not in seen:
                seen.add(problem)
                yield problem

    def split(self, *sizes: int) -> list[list[str]]:
        """The first problems of seed 0, in lists of these sizes."""
        stream = self.problems(0)
        return [list(islice(stream, size)) for size in sizes]

    def is_correct(self, problem: str, response: str) -> bool:
        """Whether the response ends with the answer to the problem, after its only "#"."""
        return response.rpartition("#")[1:] == ("#", self.answer(problem))

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """One token per character and an end token; the chat template is the prompt itself."""
        vocabulary = {token: i for i, token in enumerate([*self.letters, END])}
        backend = Tokenizer(models.WordLevel(vocabulary, unk_token=None))
        backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        backend.decoder = decoders.Fuse()
        template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
        return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, pad_token=END, chat_template=template)
