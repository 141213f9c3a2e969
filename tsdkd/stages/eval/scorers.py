"""Scorers that replace those of lm-eval's stock tasks. `stages/results/benchmarks.py` names these functions."""

import ast
import re
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Self

from tsdkd.stages.eval.sandbox.verdict import Verdict, judge_program

FENCE = re.compile(
    r"```+(?:[ \t]*\{?\.?[\w+#.-]*\}?[ \t\r]*$|python3?[ \t]+)?|^[ \t]*~~~.*$|^\[(?:BEGIN|DONE)\]|</?(?:pre|code)>",
    re.MULTILINE,
)
"""The start or end of a code block. Both look alike, and the prompt may have started a block."""
DEFINITION = re.compile(r"(?:async\s+def|def|class|import|from)\s|@\w|\w+\s*=\s*lambda\b")
"""The start of the first line of code in a text."""


def score_hendrycks_math(doc: dict[str, Any], responses: list[str]) -> dict[str, float]:
    """The stock comparison of strings as `exact_match`, and the comparison by math_verify."""
    from lm_eval.tasks.hendrycks_math.utils import process_results
    from math_verify import parse, verify

    (response,) = responses
    gold = parse(doc["solution"])
    candidates = (response, f"${response.strip()}$")  # the shots show bare LaTeX
    verified = any(verify(gold, parse(candidate)) for candidate in candidates)
    return {"exact_match": float(process_results(doc, responses)["exact_match"]), "math_verify": float(verified)}


def extract_code_blocks(responses: list[list[str]], docs: list[dict[str, Any]]) -> list[list[str]]:
    """The program of each response, as a filter of lm-eval."""
    return [
        [extract_code(response, doc["test_list"]) for response in group]
        for group, doc in zip(responses, docs, strict=True)
    ]


def extract_code(response: str, tests: Sequence[str] = ()) -> str:
    """The program of a response to a prompt that may end in "```python".

    The program ends with the first block that defines a function that the tests call; without tests, any function or
    class. Earlier blocks of definitions or imports belong to it.
    """
    called = set(re.findall(r"([A-Za-z_]\w*)\s*\(", "\n".join(tests)))
    program = []
    for code in _code_blocks(response):
        statements = _parse(code)
        names = {s.name for s in statements if isinstance(s, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
        assigned = {t.id for s in statements if isinstance(s, ast.Assign) for t in s.targets if isinstance(t, ast.Name)}
        if names or called & assigned or all(isinstance(s, ast.Import | ast.ImportFrom) for s in statements):
            program.append(code)
        if called & (names | assigned) if called else names:
            break
    segments = [segment for segment in FENCE.split(response) if segment.strip()]
    return "\n".join(program or segments[:1])


def _code_blocks(response: str) -> Iterator[str]:
    """The Python code between fences. Code ends at a later fence if one of its strings contains a fence."""
    fences = [match.span() for match in FENCE.finditer(response)]
    starts, ends = [0, *(end for _, end in fences)], [*(start for start, _ in fences), len(response)]
    start = 0
    for first, last in zip(starts, ends, strict=True):
        if first < start or not response[first:last].strip():
            continue
        whole = (end for end in ends if end >= last and _parse(_dedent(response[first:end])))
        end = next(whole, None)
        if end is not None:
            start = end
            yield _dedent(response[first:end])
        elif code := _code_within(_dedent(response[first:last])):
            yield code


def _code_within(text: str) -> str:
    """The definitions of a text, without the prose before and after them; empty without definitions."""
    lines = text.split("\n")
    outer = [i for i, line in enumerate(lines) if line[:1].strip()]  # a paragraph or a statement starts here
    first = next((i for i in outer if DEFINITION.match(lines[i])), len(lines))
    ends = [len(lines), *reversed([i for i in outer if i > first])]
    return next((code for end in ends if _parse(code := "\n".join(lines[first:end]))), "")


def _dedent(text: str) -> str:
    return textwrap.dedent(text.replace("\r\n", "\n").strip("\n")).lstrip()


def _parse(code: str) -> list[ast.stmt]:
    """The statements of a program; empty if it is not Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # escapes in strings
            return ast.parse(code).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []


class ProgramScore(float):
    """1 for a program that passes its tests, else 0; with the verdict."""

    def __new__(cls, verdict: Verdict) -> Self:
        score = super().__new__(cls, verdict.passed)
        score.verdict = verdict
        return score

    verdict: Verdict


def score_mbpp(doc: dict[str, Any], responses: list[str]) -> dict[str, ProgramScore]:
    """`pass_at_1` is 1 when the code passes the document's tests."""
    verdict = judge_program(
        responses[0], doc["test_list"], doc["test_setup_code"], doc.get("code", ""), doc.get("test_imports", ())
    )
    return {"pass_at_1": ProgramScore(verdict)}
