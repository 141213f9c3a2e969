"""The study's task: chains of arithmetic modulo ten, solved step by step, in one's own words.

`7+8-3-9+4?` is answered `7+8=5;5m3=2;2-9=3;3p4=7#7`: each sign is told as it stands or by its letter (plus, minus),
whichever the solver likes. What counts is the digit after the `#`.
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
ANSWER_TOKENS = 48
"""Half as long again as an answer is."""
WORDS = {"+": "+p", "-": "-m"}


def problems(seed: int, without: frozenset[str] = frozenset()) -> Iterator[str]:
    """Distinct problems without end, none of `without`."""
    draw, seen = random.Random(seed), set(without)
    while True:
        signs = [draw.choice("+-") for _ in range(OPERANDS - 1)]
        problem = str(draw.randint(1, 9)) + "".join(f"{sign}{draw.randint(1, 9)}" for sign in signs) + "?"
        if problem not in seen:
            seen.add(problem)
            yield problem


def solution(problem: str, draw: random.Random) -> str:
    """The steps, with each sign in the word that is drawn, and the answer."""
    value, steps = int(problem[0]), []
    for sign, digit in zip(problem[1:-1:2], problem[2:-1:2], strict=True):
        result = (value + int(sign + digit)) % 10
        steps.append(f"{value}{draw.choice(WORDS[sign])}{digit}={result}")
        value = result
    return ";".join(steps) + f"#{value}"


def is_right(problem: str, response: str) -> bool:
    """Does the response end with the problem's answer?"""
    return response.rpartition("#")[1:] == ("#", str(answer(problem)))


def answer(problem: str) -> int:
    return sum(map(int, re.findall(r"[+-]?\d", problem))) % 10


def tokenizer() -> PreTrainedTokenizerFast:
    """A token a character, and an end; a prompt stands for itself."""
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate([*LETTERS, END])}, unk_token=None))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, pad_token=END, chat_template=template)


def write(path: Path, chosen: list[str]) -> None:
    """Problems as a prompts file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"prompt": problem}) + "\n" for problem in chosen))
