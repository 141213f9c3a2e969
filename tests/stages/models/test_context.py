"""Contexts: sequences that a model cannot read are refused before anything is sampled."""

from dataclasses import dataclass

import pytest
from transformers import AutoConfig

from tsdkd.errors import InputError
from tsdkd.stages.models.context import context_length, require_context


@dataclass(frozen=True)
class Model:
    name: str
    context: int


MODELS = [Model("student", 100), Model("teacher", 80)]


def test_sequences_that_fit_pass() -> None:
    require_context(MODELS, 80)
    require_context(MODELS, 60, limit=60)


@pytest.mark.parametrize(("tokens", "limit", "name", "context"), [(81, None, "teacher", 80), (61, 60, "student", 60)])
def test_the_model_with_the_shorter_context_is_named(tokens: int, limit: int | None, name: str, context: int) -> None:
    with pytest.raises(InputError, match=f"can reach {tokens} tokens; {name} reads {context}") as caught:
        require_context(MODELS, tokens, limit)
    assert "--max-new-tokens" in caught.value.remedy


def test_the_context_comes_from_the_config() -> None:
    assert context_length(AutoConfig.for_model("llama", max_position_embeddings=128)) == 128
    assert context_length(AutoConfig.for_model("mamba")) == 2**31
