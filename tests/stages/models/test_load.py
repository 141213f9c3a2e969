"""Loaded models: the head has the tokenizer's ids, positions ignore padding, damaged weights are refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tsdkd.errors import InputError
from tsdkd.stages.models import device
from tsdkd.stages.models.language_model import position_ids
from tsdkd.stages.models.load import load_model


def test_the_head_is_cut_to_the_tokenizers_ids(student: Path, teacher: Path) -> None:
    """The heads have 264 and 272 rows; both tokenizers have 258 tokens."""
    heads = [load_model(str(path)).head for path in (student, teacher)]
    assert [head.weight.shape[0] for head in heads] == [264, 272]
    for head in heads:
        assert head.logits(torch.zeros(3, head.weight.shape[1])).shape == (3, 258)


def test_an_unsupported_head_is_refused(student: Path) -> None:
    language_model = load_model(str(student))
    language_model.model.lm_head.register_forward_hook(lambda _module, _input, output: output.square())
    with pytest.raises(InputError, match="transforms its logits"):
        language_model.head  # noqa: B018


def test_damaged_weights_are_refused(student: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(student, damaged)
    (damaged / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(InputError, match="not a causal language model that transformers can load"):
        load_model(str(damaged))
    config = json.loads((damaged / "config.json").read_text())
    (damaged / "config.json").write_text(json.dumps(config | {"model_type": "bert", "architectures": ["Unknown"]}))
    with pytest.raises(InputError, match="not a causal language model"):
        load_model(str(damaged))


def test_a_model_spread_over_devices_gives_the_same_logits(teacher: Path) -> None:
    """Offloads layers and head, as device_map="auto" does when GPUs are too small."""
    whole = load_model(str(teacher))
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}
    device_map |= {f"model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(4)}
    spread = load_model(str(teacher), device_map=device_map)
    assert spread.model.lm_head.weight.device.type == "meta"
    ids, mask = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    with torch.no_grad():
        expected, logits = (model.head.logits(model.hidden(ids, mask)) for model in (whole, spread))
    assert torch.equal(logits[mask.bool()], expected[mask.bool()])


def test_positions_do_not_depend_on_padding() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 0], [1, 1, 1, 0, 0]])
    assert position_ids(mask).tolist() == [[0, 0, 0, 1, 1], [0, 1, 2, 2, 2]]


def test_a_device_without_bf16_gets_float32(student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    AutoModelForCausalLM.from_pretrained(student, dtype=torch.bfloat16).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(student).save_pretrained(tmp_path)
    for hardware, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(device, "has_bfloat16", lambda _, hardware=hardware: hardware)
        assert load_model(str(tmp_path)).model.dtype == dtype
        assert load_model(str(tmp_path), "bfloat16").model.dtype == torch.bfloat16
        assert load_model(str(student)).model.dtype == torch.float32
