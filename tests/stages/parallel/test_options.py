"""The options of parallel runs on the command line."""

from typing import Any

import pytest

from tests.helpers.commands import refuse
from tsdkd.errors import InputError

SEEN: list[Any] = []


def refused(*arguments: Any, **_: Any) -> None:
    SEEN.append(arguments[3])
    raise InputError("refused", "Choose another.")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), (None, None)),
        (("--data-parallel", 3), (3, None)),
        (("--ray",), (None, "auto")),
        (("--ray", "--data-parallel", 3), (3, "auto")),
        (("--ray", "host:6379"), (None, "host:6379")),
        (("--ray=host:6379",), (None, "host:6379")),
    ],
)
def test_ray_needs_no_address(
    words: tuple[object, ...], expected: tuple[int | None, str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tsdkd.stages.generate.stage.generate", refused)
    refuse("generate", *words)
    assert (SEEN[-1].data_parallel, SEEN[-1].ray) == expected


def test_given_responses_are_recorded_by_one_process() -> None:
    cause, _ = refuse("generate", "--policy", "given", "--ray")
    assert cause == "--ray has no effect on --policy given."
