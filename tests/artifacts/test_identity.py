"""Differences between identities, in words."""

from dataclasses import replace
from typing import Any

import pytest

from tsdkd.artifacts.identity import describe_differences
from tsdkd.artifacts.manifest import Manifest, ModelRecord

MODEL = ModelRecord("student", "any", weights="1" * 64, tokenizer="2" * 64, chat_template="3" * 64)


def manifest(chat: dict[str, Any] | None = None, **changed: str) -> Manifest:
    models = (replace(MODEL, **changed),)
    config = {"chat": chat} if chat else {}
    return Manifest("rollouts", config=config, seed=0, parents=(), models=models, engine="any", libraries={})


@pytest.mark.parametrize(
    ("other", "differences"),
    [
        (manifest(), []),
        (manifest(weights="4" * 64), ["model student was another: different weights"]),
        (manifest(weights="4" * 64, tokenizer="5"), ["model student was another: different weights and tokenizer"]),
        (manifest(chat_template="4" * 64), ["model student was another: different chat template"]),
    ],
)
def test_differences_of_models(other: Manifest, differences: list[str]) -> None:
    assert describe_differences(manifest(), other) == differences


def test_a_changed_chat_format_is_named_once() -> None:
    """The model's template differs because the format does."""
    formatted = manifest({"template": "plain"}, chat_template="4" * 64)
    assert describe_differences(manifest(), formatted) == ["config.chat.template was None, now plain"]
    both = manifest({"template": "plain"}, weights="4" * 64, chat_template="4" * 64)
    assert describe_differences(manifest(), both)[1:] == [
        "model student was another: different weights and chat template"
    ]
