"""New adapters: on models that they fit, saved with the name of their base model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from tests.helpers.models import byte_tokenizer
from tsdkd.errors import InputError
from tsdkd.stages.config.train import LoRAConfig
from tsdkd.stages.models.language_model import LanguageModel
from tsdkd.stages.models.new_adapters import add_lora, save_adapter

TINY = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LLAMA4 = {"intermediate_size_mlp": 32, "num_local_experts": 2, "head_dim": 8}
ZAMBA2 = {
    "layers_block_type": ["hybrid", "hybrid"], "hybrid_layer_ids": [0, 1], "num_mem_blocks": 1, "mamba_ngroups": 1,
    "mamba_d_state": 8, "mamba_headdim": 8, "n_mamba_heads": 8, "chunk_size": 8,
}  # fmt: skip
MAMBA = {"state_size": 8}
FAMILIES: dict[str, dict[str, Any]] = {"llama": {}, "llama4_text": LLAMA4, "mamba": MAMBA, "falcon_mamba": MAMBA}


def tiny(family: str, more: dict[str, Any]) -> LanguageModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **TINY | more))
    return LanguageModel("student", model.eval(), byte_tokenizer())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_new_adapter_has_an_effect_and_merges_with_it(family: str) -> None:
    """Also in models that read some weights without calling their layers, and beside routers."""
    model = add_lora(tiny(family, FAMILIES[family]), LoRAConfig(rank=2), seed=0).model
    ids = torch.arange(3, 20).unsqueeze(0)
    model(ids).logits.logsumexp(-1).sum().backward()
    matrices = {name: weight for name, weight in model.named_parameters() if "lora_B" in name}
    assert [name for name, weight in matrices.items() if weight.grad is None] == []
    for weight in matrices.values():
        torch.nn.init.normal_(weight)
    with torch.no_grad():
        expected = model(ids).logits
        torch.testing.assert_close(model.merge_and_unload()(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_adapters_that_would_merge_into_another_model_are_refused() -> None:
    with pytest.raises(InputError, match=r"shares the weight of .* between several layers") as caught:
        add_lora(tiny("zamba2", ZAMBA2), LoRAConfig(rank=2), seed=0)
    assert "--lora-targets" in caught.value.remedy


def test_a_trained_adapter_names_its_base_by_path_or_hub_id(student: Path, tmp_path: Path) -> None:
    """A model of the hub is not named by its path in the cache."""
    model = AutoModelForCausalLM.from_pretrained(student)
    model.name_or_path = "/cache/snapshots/0a1b2c"
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"]))
    for name, base, revision in (("org/model", "org/model", "0a1b2c"), (str(student), str(student), None)):
        save_adapter(adapted, LanguageModel(name, adapted, byte_tokenizer()), tmp_path)
        settings = json.loads((tmp_path / "adapter_config.json").read_text())
        assert (settings["base_model_name_or_path"], settings["revision"]) == (base, revision)
