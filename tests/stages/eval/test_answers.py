"""Answers of the reasoning suite: extracted from responses of many forms, and compared as mathematics."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tsdkd.stages.eval.answers import choice_of, extract_boxed_answers, last_box, score_mathematics


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("So \\boxed{204}.", "\\boxed{204}"),
        ("First \\boxed{5}, no: $\\boxed{\\frac{1}{2}}$", "\\boxed{\\frac{1}{2}}"),
        ("\\boxed{7} and then \\boxed{8", "\\boxed{7}"),
        ("no box: 204", ""),
        ("\\boxed{", ""),
    ],
)
def test_the_last_complete_box_is_the_answer(text: str, expected: str) -> None:
    assert last_box(text) == expected


@pytest.mark.parametrize(
    ("answer", "response", "score"),
    [
        (204, "Not \\boxed{5} but \\boxed{204}.", 1),  # math_verify alone reads 5204
        (204, "The answer is 204.", 1),
        ("33", "\\boxed{033}", 1),
        (27.0, "$\\boxed{27}$", 1),
        ("\\frac{1}{2}", "\\boxed{0.5}", 1),
        ("\\left( 3, \\frac{\\pi}{2} \\right)", "\\boxed{(3, \\pi/2)}", 1),
        ("\\text{Evelyn}", "\\boxed{\\text{Evelyn}}", 1),
        (204, "\\boxed{205}", 0),
        (204, "It is 204, or rather \\boxed{7}.", 0),
        (204, "", 0),
    ],
)
def test_answers_are_compared_as_mathematics(answer: object, response: str, score: int) -> None:
    ((extracted,),) = extract_boxed_answers([[response]], [{}])
    assert score_mathematics({"Answer": answer}, [extracted]) == {"math_verify": score}


def test_gold_answers_of_math_score_1(real_data: Path) -> None:
    """MATH-500 is a part of MATH."""
    for file in (real_data / "benchmarks" / "math").glob("*/test.parquet"):
        for solution in pq.read_table(file)["solution"].to_pylist()[:20]:
            answer = last_box(solution).removeprefix("\\boxed{")[:-1]
            if answer:  # some solutions write \boxed without braces
                assert score_mathematics({"answer": answer}, [last_box(f"It is \\boxed{{{answer}}}.")])["math_verify"]


@pytest.mark.parametrize(
    "response",
    [
        "\\boxed{B}",
        "Not (A). $\\boxed{\\text{B}}$",
        "\\boxed{(B)}",
        "\\boxed{\\mathbf{B}}",
        "\\boxed{B) 5 eV} and not (C)",
        "**Answer: B**",
        "The correct answer is (B).",
        "The answer is $B$, as (A) and (D) violate it.",
        "Answer: (A)? No.\n\nAnswer: **(B) 10^-4 eV**",
        "So the best choice is B.",
        "Between (A) and (B), I prefer (B)",
    ],
)
def test_a_choice_is_found(response: str) -> None:
    assert choice_of(response) == "(B)"


@pytest.mark.parametrize("response", ["", "I cannot decide.", "All of them: A, B, C"])
def test_a_response_without_a_choice_has_none(response: str) -> None:
    assert choice_of(response) == ""
