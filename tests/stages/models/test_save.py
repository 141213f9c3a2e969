"""save_model writes files from which transformers loads the same model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3Config, PreTrainedConfig, PreTrainedModel

from tsdkd.errors import TsdkdError
from tsdkd.stages.models.save import save_model

TINY = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}


def save_source(config: PreTrainedConfig, path: Path) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(path)
    return AutoModelForCausalLM.from_pretrained(path)


FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "experts in one tensor": ("mixtral", {"num_local_experts": 4}),
    "other names in files": ("qwen3_moe", EXPERTS | {"num_experts": 4, "tie_word_embeddings": True}),
    "aliases in the config": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_loads_as_the_same_model(tmp_path: Path, family: str) -> None:
    kind, more = FAMILIES[family]
    model = save_source(AutoConfig.for_model(kind, **TINY | more), tmp_path / "source")
    save_model(model.config, model.state_dict(), torch.float32, tmp_path / "source", tmp_path / "saved")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")(ids).logits, model(ids).logits)
    assert (tmp_path / "saved" / "config.json").read_text() == (tmp_path / "source" / "config.json").read_text()


def test_weights_that_the_architecture_keeps_in_float32_stay_so(tmp_path: Path) -> None:
    sizes = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
    model = save_source(AutoConfig.for_model("glm4_moe", **TINY | EXPERTS | sizes), tmp_path / "source")
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    model.get_buffer(name).fill_(1 + 2**-20)  # not a bfloat16 number
    save_model(model.config, model.state_dict(), torch.bfloat16, tmp_path / "source", tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto")
    assert torch.equal(saved.get_buffer(name), model.get_buffer(name))
    assert saved.dtype == torch.bfloat16


def test_the_text_model_of_a_larger_model_has_one_precision(tmp_path: Path) -> None:
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(text_config=TINY, vision_config=vision | {"image_size": 28, "patch_size": 14})
    model = save_source(config, tmp_path / "source")
    save_model(model.config, model.state_dict(), torch.bfloat16, tmp_path / "source", tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert saved["dtype"] == saved["text_config"]["dtype"] == "bfloat16"


def test_a_head_of_its_own_is_not_saved_as_the_embedding(student: Path, tmp_path: Path) -> None:
    """A tied config does not describe these weights, so save_model refuses it."""
    model = AutoModelForCausalLM.from_pretrained(student)
    model.config.tie_word_embeddings = True
    with pytest.raises(TsdkdError, match=r"lm_head\.weight differs"):
        save_model(model.config, model.state_dict(), torch.float32, student, tmp_path / "saved")
