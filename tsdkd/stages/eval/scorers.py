"""Verdicts that lm-eval's stock tasks do not give; the overlays of `benchmarks.py` name these functions."""

import re
from typing import Any

from tsdkd.stages.eval import sandbox


def hendrycks_math(doc: dict[str, Any], answers: list[str]) -> dict[str, float]:
    """The stock comparison of strings, and beside it math_verify's of the same answer."""
    from lm_eval.tasks.hendrycks_math.utils import process_results
    from math_verify import parse, verify

    (answer,) = answers
    gold = parse(doc["solution"])
    readings = (answer, f"${answer.strip()}$")  # the shots answer with bare LaTeX
    verified = any(verify(gold, parse(reading)) for reading in readings)
    return {"exact_match": float(process_results(doc, answers)["exact_match"]), "math_verify": float(verified)}


def code_blocks(answers: list[list[str]], _: list[dict[str, Any]]) -> list[list[str]]:
    """lm-eval's filter: the code of each answer."""
    return [[code_of(answer) for answer in several] for several in answers]


def code_of(answer: str) -> str:
    """The first block of an answer that goes on after "```python"; one that was cut off goes to the end."""
    blocks = re.findall(r"```\w*\n(.*?)(?:```|\Z)", f"```\n{answer}", re.DOTALL)
    return next((block for block in blocks if block.strip()), "")


def mbpp(doc: dict[str, Any], answers: list[str]) -> dict[str, float]:
    """1 where the code passes the row's tests."""
    program = "\n".join([answers[0], doc["test_setup_code"], *doc["test_list"]])
    return {"pass_at_1": float(sandbox.run(program).passed)}
