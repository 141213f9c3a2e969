"""The page of Figure 8: which document it shows, and what it says about each model."""

import sys
from pathlib import Path

import pytest

from recipes.paper.figure8 import choose_document, figure_page, main
from tests.helpers.results import binary_scores, results
from tsdkd.artifacts.reader import Artifact
from tsdkd.errors import InputError
from tsdkd.stages.models.tokenizers import load_tokenizer

HOSTILE = "```\n# A heading of the response\x1b[2J\n````"
Documents = set[tuple[str, int, str]]


def documents(*numbers: int) -> Documents:
    return {("gsm8k", number, str(number)) for number in numbers}


@pytest.mark.parametrize(
    ("correct", "shown", "reason"),
    [
        ({"tsdkd": (1, 2, 3), "gkd": (1,), "student": ()}, 2, "The first of 2 that tsdkd alone"),
        ({"teacher": (0, 1, 2), "tsdkd": (2,), "student": (0, 1)}, 2, "The first of 1 that"),  # the teacher may, too
        ({"tsdkd": (1,), "gkd": (1, 2)}, 0, "The first one: tsdkd alone answers no document"),
        ({"gkd": (1,)}, 0, "The first one: "),
    ],
)
def test_the_document_is_chosen_by_a_rule(correct: dict[str, tuple[int, ...]], shown: int, reason: str) -> None:
    correct_documents = {name: documents(*numbers) for name, numbers in correct.items()}
    document, given = choose_document(correct_documents, documents(*range(4)))
    assert document[1] == shown
    assert given.startswith(reason)


@pytest.fixture
def measured(tmp_path: Path, student: Path) -> dict[str, Artifact]:
    """By model: the teacher and two trained students answer one of four documents correctly, tsdkd another one."""
    digits = {"teacher": "0001", "student": "0000", "gkd": "0001", "tsdkd": "0011"}
    return {
        name: results(tmp_path / name, {"gsm8k": binary_scores(scores)}, str(student), response=f"{name} {HOSTILE}")
        for name, scores in digits.items()
    }


def test_the_page_shows_each_response_with_its_verdict_and_length(measured: dict[str, Artifact], student: Path) -> None:
    page = figure_page(measured, ["gsm8k"])
    tokens = {name: len(load_tokenizer(str(student))(f"{name} {HOSTILE}").input_ids) for name in measured}
    assert "## gsm8k: document 2 of gsm8k\n\nThe first of 1 that tsdkd alone answers correctly." in page
    assert [line for line in page.splitlines() if line.startswith("| ")][1:] == [
        f"| teacher | 25.0 |  | wrong | {tokens['teacher']} |",
        f"| student | 0.0 | 0 | wrong | {tokens['student']} |",
        f"| gkd | 25.0 | 0 | wrong | {tokens['gkd']} |",
        f"| tsdkd | 50.0 | 1 | correct | {tokens['tsdkd']} |",
    ]
    assert "### Prompt\n\n```text\nQuestion 2?\nAnswer:\n```\n" in page  # without the example that all prompts have
    assert "### Target\n\n```text\ntarget 2\n```\n" in page
    assert "### gkd: wrong\n\n`````text\ngkd ```\n# A heading of the response⟨1b⟩[2J\n````\n`````\n" in page


def test_multiple_choice_has_no_tokens(tmp_path: Path) -> None:
    page = figure_page({"student": results(tmp_path / "student", {"sciq": binary_scores("10")})}, ["sciq"])
    assert "| student | 50.0 | 1 | correct |  |" in page
    assert "A response is the list of choices, each after its log-likelihood." in page


def test_a_single_prompt_is_shown_as_a_whole(tmp_path: Path) -> None:
    page = figure_page({"student": results(tmp_path / "student", {"sciq": binary_scores("1")})}, ["sciq"])
    assert "An example.\nQuestion 0?" in page


def test_models_without_a_common_document_are_refused(tmp_path: Path) -> None:
    scores = {"sciq": binary_scores("10")}
    measured = {"student": results(tmp_path / "a", scores), "tsdkd": results(tmp_path / "b", scores, first=2)}
    with pytest.raises(InputError, match="no document of sciq in common"):
        figure_page(measured, ["sciq"])


@pytest.mark.parametrize(("benchmark", "cause"), [("math", "has no results of math"), ("maths", "not a benchmark")])
def test_a_benchmark_that_was_not_measured_is_refused(
    benchmark: str,
    cause: str,
    measured: dict[str, Artifact],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "page.md"
    monkeypatch.setattr(sys, "argv", ["figure8", str(output), str(tmp_path), f"gsm8k {benchmark}", *measured])
    with pytest.raises(SystemExit, match="2"):
        main()
    error, remedy = capfd.readouterr().err.splitlines()
    assert cause in error
    assert remedy.startswith("try: ")
    assert not output.exists()
    monkeypatch.setattr(sys, "argv", ["figure8", str(output), str(tmp_path), "gsm8k", *measured])
    main()
    assert output.read_text() == figure_page(measured, ["gsm8k"])
