"""Weights that do not match the architecture, or are not finite, are refused by name; the head of the files is used."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration

from tests.helpers.adapters import save_adapter
from tests.helpers.families import SIZES
from tests.helpers.models import byte_tokenizer, save_tiny_model
from tsdkd.errors import InputError
from tsdkd.stages.config.types import DType
from tsdkd.stages.models.load import load_model
from tsdkd.stages.models.merged import merged_model_directory
from tsdkd.stages.models.record import model_record
from tsdkd.stages.models.weights import record_tying, require_finite

Weights = dict[str, torch.Tensor]
IDS = torch.arange(8).unsqueeze(0)


def altered(
    model: Path, path: Path, weights: Callable[[Weights], Weights] = lambda weights: weights, **config: object
) -> str:
    """A copy of a model with other weights or settings of its config."""
    shutil.copytree(model, path)
    file = path / "model.safetensors"
    save_file(weights(load_file(file)), file, {"format": "pt"})
    settings = json.loads((path / "config.json").read_text()) | config
    (path / "config.json").write_text(json.dumps(settings))
    return str(path)


def with_prefix(prefix: str) -> Callable[[Weights], Weights]:
    return lambda weights: {prefix + key: value for key, value in weights.items()}


def without(part: str) -> Callable[[Weights], Weights]:
    return lambda weights: {key: value for key, value in weights.items() if part not in key}


def with_value(value: float, key: str = "model.layers.1.mlp.up_proj.weight") -> Callable[[Weights], Weights]:
    def change(weights: Weights) -> Weights:
        weights[key][1, 2] = value
        return weights

    return change


def refusal(read: Callable[[str], object], model: str) -> str:
    with pytest.raises(InputError) as error:
        read(model)
    return str(error.value)


def record(model: str) -> object:
    return model_record("student", model)


def served(model: str, dtype: DType = "auto") -> None:
    """The directory that vLLM loads."""
    with merged_model_directory(model, dtype):
        pass


BROKEN = {
    "missing": (without("layers.1.mlp"), {}, r"3 missing (model.layers.1.mlp.down_proj.weight"),
    "no head": (without("lm_head"), {}, r"write tie_word_embeddings: true"),
    "module.": (with_prefix("module."), {}, r"Every name begins with 'module.'"),
    "compiled": (with_prefix("_orig_mod."), {}, r"Every name begins with '_orig_mod.'"),
    "adapter": (with_prefix("base_model.model."), {}, r"Every name begins with 'base_model.model.'"),
    "layer too many": (None, {"num_hidden_layers": 3}, r"9 missing (model.layers.2.input_layernorm.weight"),
    "layer too few": (None, {"num_hidden_layers": 1}, r"9 not in the architecture (model.layers.1."),
    "shape": (None, {"intermediate_size": 48}, r"(64, 32) for (48, 32)"),
    "architecture": (None, {"model_type": "gpt_neox"}, r"do not match GPTNeoXForCausalLM"),
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("read", [record, load_model])
def test_tensors_that_do_not_match_the_architecture_are_refused(
    student: Path, tmp_path: Path, kind: str, read: Callable[[str], object]
) -> None:
    """Before anything is written, and wherever a model is loaded; the message names them and a remedy."""
    weights, config, expected = BROKEN[kind]
    assert expected in refusal(read, altered(student, tmp_path / "m", weights or (lambda same: same), **config))


def test_a_tied_model_with_a_prefix_is_refused_by_its_prefix(tmp_path: Path) -> None:
    """Its files hold no head, so the head is missing too."""
    model = save_tiny_model(tmp_path / "tied", seed=1, tie_word_embeddings=True)
    assert "begins with 'module.'" in refusal(load_model, altered(model, tmp_path / "m", with_prefix("module.")))


@pytest.mark.parametrize("read", [served, load_model])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(
    student: Path, tmp_path: Path, value: float, read: Callable[[str], object]
) -> None:
    message = refusal(read, altered(student, tmp_path / "m", with_value(value)))
    assert "NaN or infinite weights in float32: model.layers.1.mlp.up_proj.weight" in message


def test_a_precision_that_overflows_is_refused(student: Path, tmp_path: Path) -> None:
    """1e5 is finite in float32 and bfloat16, and infinite in float16."""
    model = altered(student, tmp_path / "m", with_value(1e5))
    served(model)
    load_model(model, "bfloat16")
    for read in (load_model, served):
        message = refusal(lambda name, read=read: read(name, "float16"), model)
        assert "in float16: model.layers.1.mlp.up_proj.weight" in message
        assert "--dtype" in message


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.float4_e2m1fn_x2, torch.int8])
def test_quantised_tensors_can_be_read(dtype: torch.dtype) -> None:
    ones = torch.full((4,), 127, dtype=torch.uint8 if dtype != torch.int8 else torch.int8).view(dtype)
    if dtype == torch.float8_e4m3fn:  # all bits set are its NaN
        with pytest.raises(InputError, match="tensor"):
            require_finite("m", [("tensor", ones)])
    else:
        require_finite("m", [("tensor", ones)])


@pytest.mark.parametrize("form", ["sharded", "bin"])
def test_all_files_of_weights_are_read(student: Path, tmp_path: Path, form: str) -> None:
    """A NaN in the last shard or in a .bin file is refused; a missing shard is named."""
    source, model = tmp_path / "source", AutoModelForCausalLM.from_pretrained(student)
    shutil.copytree(student, source)
    (source / "model.safetensors").unlink()

    def save() -> None:
        if form == "bin":
            torch.save(model.state_dict(), source / "pytorch_model.bin")
        else:
            model.save_pretrained(source, max_shard_size="20KB")

    save()
    record(str(source))
    model.lm_head.weight.data[1, 1] = float("nan")
    save()
    for read in (served, load_model):
        assert "lm_head.weight" in refusal(read, str(source))
    if form == "sharded":
        shard = max(source.glob("*.safetensors"))
        shard.unlink()
        assert f"{shard.name}, one of" in refusal(record, str(source))


def test_an_offloaded_model_is_read_from_disk(student: Path, tmp_path: Path) -> None:
    model = altered(student, tmp_path / "m", with_value(float("nan"), "lm_head.weight"))
    places = {"model": "cpu", "lm_head": "disk"}
    assert "lm_head.weight" in refusal(lambda name: load_model(name, device_map=places), model)


def test_damaged_adapters_are_refused(student: Path, tmp_path: Path) -> None:
    """Tensors that are missing, that match no module of the base model, or that are not finite."""
    changes: dict[str, Callable[[Weights], Weights]] = {
        "missing": without("layers.1"),
        "other": lambda weights: (
            weights | {"base_model.model.model.layers.7.mlp.up_proj.lora_A.weight": torch.ones(4, 32)}
        ),
        "nan": lambda weights: {key: value * float("nan") for key, value in weights.items()},
    }
    for kind, change in changes.items():
        adapter = save_adapter(student, tmp_path / kind)
        file = adapter / "adapter_model.safetensors"
        save_file(change(load_file(file)), file, {"format": "pt"})
        assert "lora_" in refusal(load_model, str(adapter))
    assert "NaN or infinite" in refusal(served, str(tmp_path / "nan"))


SMALL_EXPERTS = {"n_routed_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}


@pytest.mark.parametrize("read", [record, load_model])
def test_a_model_with_an_adapter_beside_it_is_refused(
    student: Path, tmp_path: Path, read: Callable[[str], object]
) -> None:
    """Transformers reads both, vLLM the model alone."""
    save_adapter(student, tmp_path / "m")
    shutil.copytree(student, tmp_path / "m", dirs_exist_ok=True)
    assert "holds an adapter and a whole model" in refusal(read, str(tmp_path / "m"))


UNUSED = {
    "llama": ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.vision_tower.patch.weight", "mtp.norm.weight"],
    "gptj": ["transformer.h.0.attn.bias", "transformer.h.1.attn.masked_bias"],
    "gpt2": ["h.0.attn.bias"],
    "glm4_moe": ["model.layers.2.eh_proj.weight", "model.layers.2.self_attn.q_proj.weight"],
}


@pytest.mark.parametrize("family", UNUSED)
def test_tensors_that_a_language_model_does_not_use_are_ignored(family: str, tmp_path: Path) -> None:
    """Masks of older versions, other modalities, and layers that draft tokens."""
    config = AutoConfig.for_model(family, **SIZES, **SMALL_EXPERTS, num_nextn_predict_layers=1, rotary_dim=8)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "source")
    byte_tokenizer().save_pretrained(tmp_path / "source")
    more = {key: torch.ones(2, 2) for key in UNUSED[family]}
    model = altered(tmp_path / "source", tmp_path / "m", lambda weights: weights | more)
    record(model)
    load_model(model)


def own_head(path: Path, **more: object) -> Path:
    """A model whose config claims that its head is its embedding, and whose file has another head."""
    model = save_tiny_model(path / "untied", seed=2, **more)
    return Path(altered(model, path / "own", tie_word_embeddings=True))


def test_a_head_of_its_own_is_kept_and_recorded(tmp_path: Path) -> None:
    loaded = load_model(str(own_head(tmp_path))).model
    assert not loaded.config.tie_word_embeddings
    loaded.save_pretrained(tmp_path / "saved")
    models = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("untied", "saved"))
    for model in models:
        torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits)


def test_a_text_config_that_contradicts_the_models_is_corrected(tmp_path: Path) -> None:
    """Transformers follows the outer config."""
    text = {**SIZES, "query_pre_attn_scalar": 8, "sliding_window": 16, "tie_word_embeddings": False}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(text_config=text, vision_config=vision | {"image_size": 28, "patch_size": 14})
    config.tie_word_embeddings = True
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    record_tying(model)
    assert model.config.tie_word_embeddings
    assert model.config.get_text_config().tie_word_embeddings
