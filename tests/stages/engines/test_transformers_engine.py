"""The transformers engine: it leaves the model's generation config as it was."""

from pathlib import Path

import pytest
from transformers import GenerationConfig, PreTrainedModel

from tsdkd.stages.engines.transformers_engine import replaced_generation_config
from tsdkd.stages.models.load import load_model


def interrupt_with(model: PreTrainedModel, config: GenerationConfig) -> None:
    with replaced_generation_config(model, config):
        assert model.generation_config is config
        raise KeyboardInterrupt


def test_a_replaced_generation_config_is_restored_after_an_error(student: Path) -> None:
    model = load_model(str(student)).model
    original = model.generation_config
    with pytest.raises(KeyboardInterrupt):
        interrupt_with(model, GenerationConfig(max_new_tokens=3))
    assert model.generation_config is original
