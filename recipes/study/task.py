"""The task of the study: chains of arithmetic modulo ten, solved step by step.

A solution of `7+8-3-9+4?` is `7+8=5;5m3=2;2-9=3;3p4=7#7`: a step writes each sign as it is or as a letter (p, m), so
one problem has many solutions. Only the digit after `#` is graded.
"""

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

OPERANDS = 6
LETTERS = "0123456789+-pm=;#?"
END = "<end>"
RESPONSE_TOKENS = 48
"""One and a half times the length of a solution."""
WORDS = {"+": "+p", "-": "-m"}


def problems(seed: int, without: frozenset[str] = frozenset()) -> Iterator[str]:
    """Yield distinct problems without end, except those in `without`."""
    generator, seen = random.Random(seed), set(without)
    while True:
        signs = [generator.choice("+-") for _ in range(OPERANDS - 1)]
        problem = str(generator.randint(1, 9)) + "".join(f"{sign}{generator.randint(1, 9)}" for sign in signs) + "?"
        if problem not in seen:
            seen.add(problem)
            yield problem


def solution(problem: str, generator: random.Random) -> str:
    """A solution whose signs are written as `generator` chooses."""
    value, steps = int(problem[0]), []
    for sign, digit in zip(problem[1:-1:2], problem[2:-1:2], strict=True):
        result = (value + int(sign + digit)) % 10
        steps.append(f"{value}{generator.choice(WORDS[sign])}{digit}={result}")
        value = result
    return ";".join(steps) + f"#{value}"


def is_correct(problem: str, response: str) -> bool:
    """Whether the response ends with the answer to the problem."""
    return response.rpartition("#")[1:] == ("#", str(answer(problem)))


def answer(problem: str) -> int:
    return sum(map(int, re.findall(r"[+-]?\d", problem))) % 10


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per character and an end token; the chat template is the prompt itself."""
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate([*LETTERS, END])}, unk_token=None))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, pad_token=END, chat_template=template)


def write(path: Path, chosen: list[str]) -> None:
    """Write problems as a prompts file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"prompt": problem}) + "\n" for problem in chosen))
