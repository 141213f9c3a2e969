"""Packed batches: each sequence is read as if it were alone, or the model is refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.helpers.families import FAMILIES, PACKING_CASES, RECURRENT, SIZES, tiny
from tests.helpers.models import byte_tokenizer
from tsdkd.stages.data.batches import join_sequences, predicting_hidden
from tsdkd.stages.models import packed_attention
from tsdkd.stages.models.language_model import LanguageModel, hidden_states
from tsdkd.stages.models.packed_attention import PACKED, PackedMask, packed_mask, packed_sequences

LENGTHS = [12, 7, 3]
POSITIONS = torch.cat([torch.arange(length) for length in LENGTHS]).unsqueeze(0)
Gradients = dict[str, torch.Tensor]


def sequences() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(258, (1, length), generator=generator) for length in LENGTHS]


def eager(family: str, **config: object) -> LanguageModel:
    """With eager attention, which has all features of a family."""
    language_model = tiny(family, **(PACKING_CASES.get(family, {}) | config))
    language_model.model.set_attn_implementation("eager")
    return language_model


def read_and_differentiate(model: Any, read: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Gradients]:
    """Hidden states (1, tokens, width), and the gradients of a weighted sum of them."""
    hidden = read()
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2))
    (hidden * weights).sum().backward()
    gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    model.zero_grad()
    return hidden.detach(), gradients


def require_equal(found: tuple[torch.Tensor, Gradients], expected: tuple[torch.Tensor, Gradients]) -> None:
    assert float((found[0] - expected[0]).norm() / expected[0].norm()) < 1e-5
    assert found[1].keys() == expected[1].keys()
    total = torch.cat([value.flatten() for value in expected[1].values()]).norm()
    for name, value in expected[1].items():
        assert float((found[1][name] - value).norm() / total) < 1e-5, name


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", [*FAMILIES, "gpt_oss", "gpt2", "olmo3"])
def test_packed_sequences_are_read_as_alone(family: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden states and gradients, with windows and blocks that are shorter than the sequences."""
    monkeypatch.setattr(packed_attention, "BLOCK", 5)
    language_model = eager(family)
    assert language_model.packing_problem is None
    model, ids = language_model.model, sequences()
    alone = read_and_differentiate(
        model, lambda: torch.cat([hidden_states(model, row, torch.ones_like(row)) for row in ids], 1)
    )
    model.config._attn_implementation = PACKED
    if checkpointing:
        model.train()
        model.gradient_checkpointing_enable()
    packed = read_and_differentiate(model, lambda: hidden_states(model, torch.cat(ids, 1), None, POSITIONS))
    require_equal(packed, alone)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_packed_attention_drops_weights_in_training_alone(family: str) -> None:
    """Fused, with a window, and with a soft-cap; the second forward of checkpointing drops the same weights."""
    model, ids = eager(family, attention_dropout=0.5).model, torch.cat(sequences(), 1)
    model.config._attn_implementation = PACKED

    def read() -> tuple[torch.Tensor, Gradients]:
        torch.manual_seed(3)
        return read_and_differentiate(model, lambda: hidden_states(model, ids, None, POSITIONS))

    evaluated, expected = read()[0], model.train() and read()
    assert float((expected[0] - evaluated).norm() / evaluated.norm()) > 0.01
    model.gradient_checkpointing_enable()
    require_equal(read(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", RECURRENT)
def test_recurrent_and_hybrid_models_cannot_pack(family: str, dtype: torch.dtype) -> None:
    assert tiny(family, dtype).packing_problem == "mixes the sequences of a packed batch"


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral", "qwen3_moe"])
def test_packing_is_recognised_in_bfloat16(family: str) -> None:
    language_model = tiny(family, torch.bfloat16)
    language_model.model.set_attn_implementation("eager")
    assert language_model.packing_problem is None


def test_a_model_with_biases_of_its_own_cannot_pack() -> None:
    problem = tiny("mpt", d_model=32, n_heads=4, n_layers=2).packing_problem
    assert problem
    assert problem.startswith("does not read packed batches (")


def test_the_check_restores_the_attention_of_all_parts() -> None:
    """A text model inside a larger one: the packed implementation would stay in the others."""
    text = SIZES | {"model_type": "gemma3_text", "query_pre_attn_scalar": 8}
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision | {"image_size": 14})
    model = AutoModelForCausalLM.from_config(config).eval()
    model.set_attn_implementation({"": "eager", "text_config": "sdpa", "vision_config": "eager"})
    assert LanguageModel("gemma3", model, byte_tokenizer()).packing_problem is None
    found = [each._attn_implementation for each in (config, config.text_config, config.vision_config)]
    assert found == ["eager", "sdpa", "eager"]


@pytest.mark.parametrize("share", [1.0, 0.01])
def test_a_model_that_ignores_positions_cannot_pack(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where positions change little."""
    language_model = tiny("gpt2")
    decoder = language_model.model.transformer
    decoder.wpe.weight.data *= share
    forward = decoder.forward

    def ignoring(*inputs: Any, position_ids: Any = None, **more: Any) -> Any:
        return forward(*inputs, **more)

    monkeypatch.setattr(decoder, "forward", ignoring)
    assert language_model.packing_problem == "ignores the positions of a packed batch"


def test_a_model_that_mixes_sequences_a_little_cannot_pack(monkeypatch: pytest.MonkeyPatch) -> None:
    language_model = tiny("llama")
    decoder = language_model.model.model
    forward = decoder.forward

    def mixing(*inputs: Any, **more: Any) -> Any:
        output = forward(*inputs, **more)
        output.last_hidden_state = output.last_hidden_state + 0.01 * output.last_hidden_state.mean(1, keepdim=True)
        return output

    monkeypatch.setattr(decoder, "forward", mixing)
    assert language_model.packing_problem == "mixes the sequences of a packed batch"


def test_scaling_by_the_place_in_the_batch_cannot_pack() -> None:
    """Llama 4 scales attention by the row's position, from the 8,192nd token on."""
    problem = tiny("llama4_text", attn_temperature_tuning=True).packing_problem
    assert problem == "scales attention by a token's place in the batch"


def test_a_soft_cap_that_packed_attention_ignores_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    language_model = eager("gemma2")
    unfused = packed_attention._unfused
    monkeypatch.setattr(
        packed_attention, "_unfused", lambda *inputs, **more: unfused(*inputs, **more | {"softcap": 1e6})
    )
    assert language_model.packing_problem == "computes another attention in packed batches"


def test_a_model_that_cannot_pack_reads_padded_batches() -> None:
    language_model = tiny("mamba", state_size=8)
    prompts, responses = [[5, 6, 7], [8], [9, 9]], [[1], [2, 3, 4, 5], [6, 7]]
    turns = [[range(1)], [range(4)], [range(2)]]
    with torch.no_grad():
        padded, packed = (
            predicting_hidden(language_model, join_sequences(prompts, responses, turns, packed=packed))
            for packed in (False, True)
        )
    torch.testing.assert_close(packed, padded, rtol=1e-5, atol=1e-5)


def mask_of(function: Callable[..., Any], lengths: list[int], local_size: int | None = None) -> PackedMask:
    total = sum(lengths)
    sizes: dict[str, Any] = {"batch_size": 1, "q_length": total, "kv_length": total}
    with packed_sequences(tiny("llama").model.config, lengths, torch.device("cpu")):
        return packed_mask(**sizes, mask_function=function, local_size=local_size)


def test_masks_become_lengths_and_windows() -> None:
    def causal(_b: Any, _h: Any, query: Any, key: Any) -> torch.Tensor:
        return key <= query

    def sliding(_b: Any, _h: Any, query: Any, key: Any) -> torch.Tensor:
        return (key <= query) & (key > query - 3)

    def chunked(_b: Any, _h: Any, query: Any, key: Any) -> torch.Tensor:
        return (key <= query) & (key // 3 == query // 3)

    assert mask_of(causal, [5, 2]) == PackedMask((5, 2), None)
    assert mask_of(sliding, [5, 2], 3) == PackedMask((5, 2), 3)
    assert mask_of(sliding, [4, 2], 3) == PackedMask((4, 2), 3)
    assert mask_of(sliding, [2, 3], 3) == PackedMask((2, 3), None)
    assert mask_of(chunked, [5, 2], 3) == PackedMask((3, 2, 2), None)
    with pytest.raises(NotImplementedError, match="later tokens"):
        mask_of(lambda _b, _h, query, key: key <= query + 1, [5, 2])
    for other in (2, 4):
        with pytest.raises(NotImplementedError, match="unknown"):
            mask_of(lambda _b, _h, query, key, other=other: (key <= query) & (key > query - other), [5, 2], 3)
    with pytest.raises(NotImplementedError, match="unknown"):
        mask_of(lambda _b, _h, query, key: (key <= query) & ((query - key) % 2 == 0), [5, 2])


def test_kernels_of_variable_length_get_the_ends_of_the_sequences() -> None:
    config = AutoConfig.for_model("llama", attn_implementation="flash_attention_2")
    with packed_sequences(config, [2, 5, 3], torch.device("cpu")) as arguments:
        assert {name: value.tolist() for name, value in arguments.items() if "cu" in name} == {
            "cu_seq_lens_q": [0, 2, 7, 10],
            "cu_seq_lens_k": [0, 2, 7, 10],
        }
        assert arguments["cu_seq_lens_q"].dtype == torch.int32
        assert arguments["max_length_q"] == arguments["max_length_k"] == 5
        assert config._attn_implementation == "flash_attention_2"


def test_no_length_by_length_mask_exists() -> None:
    """A mask of 200,000 tokens would take 40 GB."""

    def causal(_b: Any, _h: Any, query: Any, key: Any) -> torch.Tensor:
        return key <= query

    assert mask_of(causal, [150_000, 50_000]).pieces == (150_000, 50_000)
