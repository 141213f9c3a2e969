"""A head that is loaded with the first layer alone equals the head of the whole model."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.families import tiny
from tsdkd.errors import InputError
from tsdkd.stages.models import layers
from tsdkd.stages.models.head import load_head
from tsdkd.stages.models.load import load_model
from tsdkd.stages.models.spec import load_spec


def save(family: str, directory: Path, **settings: object) -> Path:
    model = tiny(family, **settings)
    model.model.save_pretrained(directory)
    model.tokenizer.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "phi", "granite"])
def test_it_is_the_head_of_the_whole_model(family: str, tmp_path: Path) -> None:
    """Among them a softcap, two scales, a bias and tied embeddings."""
    spec = load_spec(str(save(family, tmp_path)))
    head, expected = load_head(spec, "float32"), load_model(str(tmp_path), "float32").head
    assert torch.equal(head.weight, expected.weight)
    assert (head.bias is None) == (expected.bias is None)
    assert head.bias is None or torch.equal(head.bias, expected.bias)
    for name in ("logit_scale", "softcap", "vocab_size"):
        assert getattr(head, name) == getattr(expected, name)


def test_layers_are_read_neither_whole_nor_quantised(tmp_path: Path) -> None:
    """The model's other layers are missing, and the first one is saved in a form that transformers cannot read."""
    save("llama", tmp_path, tie_word_embeddings=False)
    tensors = load_file(tmp_path / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if "layers." not in name}
    packed = {f"{name}_packed": value for name, value in tensors.items() if "layers.0." in name}
    save_file(kept | packed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert torch.equal(load_head(load_spec(str(tmp_path)), "float32").weight, tensors["lm_head.weight"])
    del kept["lm_head.weight"]
    save_file(kept | packed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="quantised"):
        load_head(load_spec(str(tmp_path)), "float32")


def test_a_model_without_a_first_layer_of_its_own_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("no such layer")

    spec = load_spec(str(save("llama", tmp_path)))
    monkeypatch.setattr(layers, "_describe", refuse)
    with pytest.raises(InputError, match="without its layers") as caught:
        load_head(spec, "float32")
    assert "--engine transformers" in caught.value.remedy
