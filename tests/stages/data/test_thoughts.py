"""Thoughts are found and removed by their markers, the same ones in every command."""

import pytest

from tsdkd.stages.data.thoughts import THOUGHT_MARKERS, THOUGHT_START, remove_thought


@pytest.mark.parametrize("marker", THOUGHT_MARKERS)
def test_thoughts_of_all_families(marker: str) -> None:
    end = THOUGHT_MARKERS[marker]
    assert remove_thought("Question", f"{marker}a{end}\n\nb") == ("b", True)
    assert remove_thought("Question", f"{marker}a{end}b{marker}c{end}d") == ("d", True)
    assert remove_thought(f"Question {marker}\n", f"a{end} b") == ("b", True)
    assert remove_thought(f"Question {marker}\n\n{end}\n\n", "b") == ("b", True)
    for prompt, response in (
        (f"Question {marker}\n", "a"),
        ("Question", f"\n{marker}a"),
        ("", f"{marker}{end}{marker}a"),
    ):
        assert remove_thought(prompt, response) == ("", False)
    for response in ("", " b ", f"It writes {marker} in the text", f"In {marker} x"):
        assert remove_thought("Question", response) == (response, True)


@pytest.mark.parametrize("start", [*THOUGHT_MARKERS, "<|channel|>analysis"])
def test_the_start_of_every_thought_is_found(start: str) -> None:
    assert THOUGHT_START.match(f"\n{start} a")
