"""New adapters: on models that they fit, saved with the name of their base model."""

import json
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from tests.helpers.models import byte_tokenizer
from tsdkd.errors import InputError
from tsdkd.stages.config.train import LoRAConfig
from tsdkd.stages.models.load import LanguageModel
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
UNMERGEABLE: dict[str, tuple[str, dict[str, Any], str]] = {
    "one weight in several layers": ("zamba2", ZAMBA2, "has the weight of .* in several layers"),
    "a layer that peft refuses": ("mamba", {"state_size": 8}, "peft cannot adapt"),
    "a layer that peft cannot run": ("llama4_text", LLAMA4, "does not run with these adapters"),
}


@pytest.mark.parametrize("family", UNMERGEABLE)
def test_adapters_that_would_merge_into_another_model_are_refused(family: str) -> None:
    kind, more, reason = UNMERGEABLE[family]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **TINY | more))
    with pytest.raises(InputError, match=reason) as caught:
        add_lora(LanguageModel("student", model.eval(), byte_tokenizer()), LoRAConfig(rank=2), seed=0)
    assert "--lora-targets" in caught.value.remedy


def test_a_trained_adapter_names_its_base_by_path_or_hub_id(student: Path, tmp_path: Path) -> None:
    """A model of the hub is not named by its place in the cache."""
    model = AutoModelForCausalLM.from_pretrained(student)
    model.name_or_path = "/cache/snapshots/0a1b2c"
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"]))
    for name, base, revision in (("org/model", "org/model", "0a1b2c"), (str(student), str(student), None)):
        save_adapter(adapted, LanguageModel(name, adapted, byte_tokenizer()), tmp_path)
        settings = json.loads((tmp_path / "adapter_config.json").read_text())
        assert (settings["base_model_name_or_path"], settings["revision"]) == (base, revision)
