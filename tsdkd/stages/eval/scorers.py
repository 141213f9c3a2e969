"""Scorers that replace those of lm-eval's stock tasks. `stages/results/benchmarks.py` names these functions."""

import re
from typing import Any

from tsdkd.stages.eval import sandbox


def score_hendrycks_math(doc: dict[str, Any], responses: list[str]) -> dict[str, float]:
    """The stock comparison of strings as `exact_match`, and the comparison by math_verify."""
    from lm_eval.tasks.hendrycks_math.utils import process_results
    from math_verify import parse, verify

    (response,) = responses
    gold = parse(doc["solution"])
    candidates = (response, f"${response.strip()}$")  # the shots show bare LaTeX
    verified = any(verify(gold, parse(candidate)) for candidate in candidates)
    return {"exact_match": float(process_results(doc, responses)["exact_match"]), "math_verify": float(verified)}


def extract_code_blocks(responses: list[list[str]], _: list[dict[str, Any]]) -> list[list[str]]:
    """The code of each response, as a filter of lm-eval."""
    return [[extract_code(response) for response in group] for group in responses]


def extract_code(response: str) -> str:
    """The first code block of a response to a prompt that ends in "```python"; a truncated block runs to the end."""
    blocks = re.findall(r"```\w*\n(.*?)(?:```|\Z)", f"```\n{response}", re.DOTALL)
    return next((block for block in blocks if block.strip()), "")


def score_mbpp(doc: dict[str, Any], responses: list[str]) -> dict[str, float]:
    """`pass_at_1` is 1 when the code passes the document's tests."""
    program = "\n".join([responses[0], doc["test_setup_code"], *doc["test_list"]])
    return {"pass_at_1": float(sandbox.run_program(program).passed)}
