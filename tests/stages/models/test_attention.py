"""Attention implementations: one that computes another attention than the model's is replaced or refused."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_utils import AttentionInterface

from tests.helpers.families import tiny
from tests.helpers.models import byte_tokenizer
from tests.helpers.prompts import write_prompts
from tsdkd.errors import ArtifactError, InputError
from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.generate.stage import generate
from tsdkd.stages.models.attention import check_attention, require_attention
from tsdkd.stages.models.load import load_model
from tsdkd.stages.observer import SilentObserver


class Warnings(SilentObserver):
    def __init__(self) -> None:
        self.messages: list[str] = []

    def warning(self, message: str) -> None:
        self.messages.append(message)


def model_with(family: str, kernel: str, dtype: torch.dtype = torch.float32, **config: object) -> PreTrainedModel:
    model = tiny(family, dtype, **config).model
    model.set_attn_implementation(kernel)
    return model


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(20).unsqueeze(0)).logits


def check(model: PreTrainedModel, requested: str | None = None) -> list[str]:
    """The warnings of the check."""
    observer = Warnings()
    check_attention("m", model, requested, observer)
    return observer.messages


@pytest.fixture
def dropping_kernel() -> Iterator[str]:
    """A kernel that ignores an argument, as sdpa ignores the soft-cap."""
    sdpa: Any = AttentionInterface().get_interface("sdpa", None)

    def dropping(*inputs: Any, scaling: float | None = None, **settings: Any) -> Any:
        return sdpa(*inputs, **settings)

    AttentionInterface.register("dropping", dropping)
    yield "dropping"
    AttentionInterface._global_mapping.pop("dropping")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eager_replaces_a_kernel_without_the_models_softcap(dtype: torch.dtype) -> None:
    """With the weights of a new model, whose attention logits are far below the soft-cap."""
    model = model_with("gemma2", "sdpa", dtype, initializer_range=0.02)
    (warning,) = check(model)
    assert "m runs with eager attention: sdpa computes another attention" in warning
    assert torch.equal(logits(model), logits(model_with("gemma2", "eager", dtype, initializer_range=0.02)))
    with pytest.raises(InputError, match=r"sdpa computes another attention .* for m"):
        check(model_with("gemma2", "sdpa", dtype, initializer_range=0.02), requested="sdpa")


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", {}),
        ("gemma3_text", {"sliding_window": 4}),
        ("mistral", {"sliding_window": 4}),
        ("gemma2", {"attn_logit_softcapping": None}),
    ],
)
def test_a_kernel_with_the_models_attention_stays(family: str, config: dict[str, object]) -> None:
    """Also where windows are shorter than what the check reads."""
    model = model_with(family, "sdpa", **config)
    before = logits(model)
    assert check(model, "sdpa") == []
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(logits(model), before)


def test_a_kernel_that_drops_an_unknown_feature_is_replaced(dropping_kernel: str) -> None:
    model = model_with("granite", dropping_kernel, attention_multiplier=0.5)
    assert len(check(model)) == 1
    assert model.config._attn_implementation == "eager"


def test_a_kernel_that_does_not_run_is_refused(dropping_kernel: str) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("heads are too wide")

    AttentionInterface.register(dropping_kernel, fail)
    with pytest.raises(InputError, match=r"dropping does not run \(heads are too wide\) for m"):
        check(model_with("llama", dropping_kernel), dropping_kernel)


def test_unknown_unavailable_and_unsupported_names_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "bloom"
    tiny("bloom").model.save_pretrained(path)
    for name, cause in (
        ("nothing", r"Choose from eager, flash_attention_2.*, flex_attention, sdpa\."),
        ("flash_attention_2", "flash_attention_2 is not installed"),
        ("kernels-community/flash-attn2", "is custom code of the hub, which tsdkd does not run"),
        ("sdpa", "bloom does not support sdpa attention"),
    ):
        with pytest.raises(InputError, match=cause):
            require_attention(name, [str(path)])
    require_attention("eager", [str(path)])
    require_attention(None, [str(path)])


def test_the_attention_is_part_of_an_artifacts_identity(student: Path, tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "p.jsonl", 2)
    config = GenerateConfig(engine="transformers", max_new_tokens=2, attention="sdpa")
    rollouts = generate(prompts, str(student), tmp_path / "r", config)
    assert rollouts.manifest.config["attention"] == "sdpa"
    with pytest.raises(ArtifactError, match="attention"):
        generate(prompts, str(student), tmp_path / "r", GenerateConfig(engine="transformers", max_new_tokens=2))


def test_a_model_is_loaded_with_the_requested_attention(tmp_path: Path) -> None:
    """transformers' own choice for this model is sdpa."""
    tiny("gemma2").model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="sdpa computes another attention"):
        load_model(str(tmp_path), attention="sdpa")
    assert load_model(str(tmp_path)).model.config._attn_implementation == "eager"
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"
