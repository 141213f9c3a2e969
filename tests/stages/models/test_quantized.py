"""Quantised base weights: one function in every mode, gradients to what lies below, planned bytes, exact merging."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, MambaConfig

from tests.helpers.models import byte_tokenizer, save_tiny_model
from tsdkd.errors import InputError
from tsdkd.stages.config.train import LoRAConfig, TrainConfig
from tsdkd.stages.config.types import QuantizedBits
from tsdkd.stages.models.language_model import LanguageModel
from tsdkd.stages.models.load import load_model
from tsdkd.stages.models.memory import estimate_training_memory
from tsdkd.stages.models.merged_weights import merged_weights
from tsdkd.stages.models.model_size import model_size
from tsdkd.stages.models.new_adapters import add_lora
from tsdkd.stages.models.quantized import dequantized_weight, quantized_layers
from tsdkd.stages.models.spec import load_config

pytest.importorskip("bitsandbytes", reason="needs `pip install bitsandbytes`")
BITS: list[QuantizedBits] = ["4bit", "8bit"]
IDS = torch.arange(3, 23).view(2, 10)
ERROR = {"4bit": 0.12, "8bit": 0.01}
"""Of a weight of normal numbers, relative: that of nf4 is about 0.09."""


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough for bitsandbytes to pack 4-bit weights on a CPU; the layers of GPT-2 are Conv1D."""
    path = tmp_path_factory.mktemp("base")
    if request.param == "llama":
        return save_tiny_model(path, seed=4, width=128)
    tokenizer = byte_tokenizer()
    config = GPT2Config(vocab_size=264, n_embd=128, n_head=4, n_layer=2, n_positions=64, initializer_range=0.2)
    config.eos_token_id = config.bos_token_id = tokenizer.eos_token_id
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    torch.manual_seed(4)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def adapted(base: Path, bits: QuantizedBits | None) -> LanguageModel:
    """With adapters that change the logits."""
    student = add_lora(load_model(str(base), "float32", quantize=bits), LoRAConfig(rank=4), seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, weight in student.model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.1, generator=generator)
    return student


def read(student: LanguageModel, ids: torch.Tensor = IDS) -> torch.Tensor:
    return student.hidden(ids, torch.ones_like(ids))


def adapter_grads(student: LanguageModel) -> dict[str, torch.Tensor]:
    student.model.train()
    student.model.zero_grad()
    read(student).square().sum().backward()
    return {name: weight.grad for name, weight in student.model.named_parameters() if weight.requires_grad}


@pytest.mark.parametrize("bits", BITS)
def test_a_forward_without_gradients_changes_nothing(base: Path, bits: QuantizedBits) -> None:
    """bitsandbytes would pack 4-bit weights: they would pass no gradient, and dequantise to other values."""
    student = adapted(base, bits)
    layers = quantized_layers(student.model)
    weights = {name: dequantized_weight(layer) for name, layer in layers.items()}
    grads = adapter_grads(student)
    assert all(grad.abs().sum() > 0 for grad in grads.values())
    student.model.eval()
    with torch.no_grad():
        together, alone = read(student), torch.cat([read(student, row) for row in IDS.split(1)])
    assert torch.allclose(together, alone, atol=1e-4)
    assert torch.allclose(together, read(student.__class__(student.name, student.model.train(), student.tokenizer)))
    again = adapter_grads(student)
    assert all(torch.allclose(again[name], grad, rtol=1e-4, atol=1e-6) for name, grad in grads.items())
    assert all(torch.equal(dequantized_weight(layer), weights[name]) for name, layer in layers.items())


@pytest.mark.parametrize("bits", BITS)
def test_gradients_are_those_of_the_dequantised_weights(base: Path, bits: QuantizedBits) -> None:
    student, full = adapted(base, bits), adapted(base, None)
    for name, layer in quantized_layers(student.model).items():
        weight, found = full.model.get_submodule(name).weight, dequantized_weight(layer)
        weight.data.copy_(found.T if layer.source_cls.__name__ == "Conv1D" else found)
    expected = adapter_grads(full)
    for name, grad in adapter_grads(student).items():
        assert (grad - expected[name]).norm() < 1e-4 * expected[name].norm()


@pytest.mark.parametrize("bits", BITS)
def test_an_outlier_among_the_inputs_does_not_change_other_rows(base: Path, bits: QuantizedBits) -> None:
    """With 8 bits, bitsandbytes would multiply the columns of an outlier in another precision for the whole batch."""
    layer = next(iter(quantized_layers(load_model(str(base), "float32", quantize=bits).model).values()))
    inputs = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0))
    inputs[0, 5] = 50
    assert torch.allclose(layer(inputs)[1:], layer(inputs[1:]), atol=1e-5)
    expected = inputs @ dequantized_weight(layer).T + (0 if layer.bias is None else layer.bias)
    assert torch.allclose(layer(inputs), expected, atol=1e-3)


@pytest.mark.parametrize("bits", BITS)
def test_a_quantised_model_takes_the_planned_bytes(base: Path, bits: QuantizedBits) -> None:
    """All but the head and the embeddings is quantised; 4 bits also keep a description of about 100 bytes a layer."""
    model = load_model(str(base), "float32", quantize=bits).model
    full = load_model(str(base), "float32").model
    lora = LoRAConfig(rank=4, quantize=bits)
    estimate = estimate_training_memory(load_config(str(base)), (), 10, TrainConfig(lora=lora), "float32")
    trained = sum(4 * sum(layer.weight.shape) for layer in linear_layers(full))
    layers = quantized_layers(model)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    kept = {
        name: value.nbytes
        for name, value in model.state_dict().items()
        if not name.endswith(("quant_state.bitsandbytes__nf4", "weight_format"))
        and not (tied and name == "lm_head.weight")
    }
    offsets = 4 * len(layers) if bits == "4bit" else 0  # in that description
    assert estimate.weights - 8 * trained == sum(kept.values()) + offsets
    for name, layer in layers.items():
        weight = full.get_submodule(name).weight
        weight = weight.T if layer.source_cls.__name__ == "Conv1D" else weight
        assert (dequantized_weight(layer) - weight).norm() < ERROR[bits] * weight.norm()


def linear_layers(model: Any) -> list[Any]:
    head = model.get_output_embeddings()
    return [m for m in model.modules() if type(m).__name__ in {"Linear", "Conv1D"} and m is not head]


@pytest.mark.parametrize("bits", BITS)
def test_merged_weights_are_the_model_that_was_trained(base: Path, bits: QuantizedBits) -> None:
    """Not the full weights with the adapter, and not weights that are rounded to bits again."""
    student, full = adapted(base, bits), load_model(str(base), "float32")
    with torch.no_grad():
        trained = read(student)
        full.model.load_state_dict(merged_weights(student.model.get_base_model()))
        assert (read(full) - trained).norm() < 1e-4 * trained.norm()


@pytest.mark.parametrize("bits", BITS)
def test_weights_that_a_model_reads_without_their_layers_are_not_quantised(tmp_path: Path, bits: QuantizedBits) -> None:
    """Mamba multiplies with the weight of dt_proj, and its kernels with that of out_proj."""
    config = MambaConfig(vocab_size=264, hidden_size=64, state_size=8, num_hidden_layers=1, eos_token_id=257)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    student = adapted(tmp_path / "model", bits)
    layers = quantized_layers(student.model)
    assert {name.removesuffix(".base_layer").rpartition(".")[2] for name in layers} == {"in_proj", "x_proj"}
    planned = model_size(config).quantized_shapes
    assert sorted(planned) == sorted((layer.out_features, layer.in_features) for layer in layers.values())
    assert all(grad.abs().sum() > 0 for grad in adapter_grads(student).values())


def test_a_model_that_is_quantised_already_is_refused(student: Path, tmp_path: Path) -> None:
    """transformers would keep its bits, whatever --quantize says."""
    copy = Path(shutil.copytree(student, tmp_path / "model"))
    settings = json.loads((copy / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (copy / "config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match="is quantised already"):
        load_model(str(copy), "float32", quantize="8bit")


@pytest.mark.parametrize("bits", BITS)
def test_a_weight_that_is_not_finite_is_refused(base: Path, tmp_path: Path, bits: QuantizedBits) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    linear_layers(model)[0].weight.data[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match="NaN or infinite"):
        load_model(str(tmp_path / "model"), "float32", quantize=bits)
