"""The transformers engine: the model's generation config, and logits that are not finite."""

from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel

from tsdkd.errors import NotFiniteError
from tsdkd.stages.engines.transformers_engine import FiniteLogits, replaced_generation_config
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


def test_only_responses_that_go_on_need_finite_logits(student: Path) -> None:
    """Both prompts end with an end token; then the first response ends."""
    model, end, other = load_model(str(student)), 7, 3
    for broken, wrong in ((0, None), (1, "computes NaN")):
        check = FiniteLogits(model, [end])
        logits = torch.zeros(2, 10)
        logits[:, 4] = -torch.inf
        prompts = torch.tensor([[other, end], [other, end]])
        assert check(prompts, logits) is logits
        logits[broken, 5] = torch.nan
        ids = torch.cat([prompts, torch.tensor([[end], [other]])], 1)
        if wrong is None:
            assert check(ids, logits) is logits
        else:
            with pytest.raises(NotFiniteError, match=wrong):
                check(ids, logits)
    with pytest.raises(NotFiniteError):
        FiniteLogits(model, [end])(prompts, logits)
