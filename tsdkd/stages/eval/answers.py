"""Extraction and comparison of the reasoning suite's answers. `stages/results/reasoning.py` names these functions."""

import random
import re
from typing import Any

LETTER = r"([A-D])(?![A-Za-z])"
BOXED_LETTER = re.compile(r"(?:\\[a-z]+\s*\{|[^A-Za-z\\])*" + LETTER)
"""A choice at the start of a box: "B", "(B)", "\\text{B}", "B) 5 eV"."""
NAMED_LETTER = re.compile(r"(?i:answer|choice|option)(?i:\s+is)?[^A-Za-z]{0,12}" + LETTER)
"""A choice after the word that announces it: "Answer: B", "the answer is **(B)**"."""
LETTER_IN_BRACKETS = re.compile(r"\(([A-D])\)")


def last_box(text: str) -> str:
    """The last complete \\boxed{...} of a text, with its braces; empty without one."""
    end = len(text)
    while (start := text.rfind("\\boxed{", 0, end)) >= 0:
        depth = 0
        for i in range(text.index("{", start), len(text)):
            depth += {"{": 1, "}": -1}.get(text[i], 0)
            if not depth:
                return text[start : i + 1]
        end = start
    return ""


def extract_boxed_answers(responses: list[list[str]], docs: list[dict[str, Any]]) -> list[list[str]]:
    """The last boxed answer of each response, else the response itself, as a filter of lm-eval.

    math_verify alone would join the numbers of several boxes into one.
    """
    return [[last_box(response) or response for response in group] for group in responses]


def score_mathematics(doc: dict[str, Any], answers: list[str]) -> dict[str, float]:
    """`math_verify` is 1 when the answer equals the document's, as mathematical expressions."""
    from math_verify import parse, verify

    target = next(value for key, value in doc.items() if key.lower() == "answer")
    return {"math_verify": float(verify(parse(f"\\boxed{{{target}}}"), parse(answers[0])))}


def extract_choices(responses: list[list[str]], docs: list[dict[str, Any]]) -> list[list[str]]:
    """The chosen letter of each response in brackets, as a filter of lm-eval; empty without one."""
    return [[choice_of(response) for response in group] for group in responses]


def choice_of(response: str) -> str:
    """The boxed letter, else the last one that the response names as its answer, else the last one in brackets."""
    boxed = BOXED_LETTER.match(last_box(response).removeprefix("\\boxed"))
    letters = [boxed[1]] if boxed else NAMED_LETTER.findall(response) or LETTER_IN_BRACKETS.findall(response)
    return f"({letters[-1]})" if letters else ""


def shuffle_choices(dataset: Any) -> Any:
    """Documents of GPQA with their choices in an order that the question alone decides.

    lm-eval shuffles without a seed: two models would see other prompts.
    """
    from lm_eval.tasks.gpqa.cot_zeroshot.utils import preprocess

    def shuffle(doc: dict[str, Any]) -> dict[str, Any]:
        correct = preprocess(doc["Correct Answer"])
        choices = [*(preprocess(doc[f"Incorrect Answer {i}"]) for i in (1, 2, 3)), correct]
        random.Random(doc["Question"]).shuffle(choices)
        letters = {f"choice{i}": choice for i, choice in enumerate(choices, 1)}
        return letters | {"choices": choices, "answer": f"({'ABCD'[choices.index(correct)]})"}

    return dataset.map(shuffle)
