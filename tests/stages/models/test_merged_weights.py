"""Merged adapters give the trained model, in the files of a checkpoint and for vLLM during training."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from tests.helpers.merged import merged_state_dict
from tsdkd.stages.models.adaptable import base_with_adapters

TINY = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "tied head": ("llama", {"tie_word_embeddings": True}),
    "experts in one tensor": ("qwen3_moe", EXPERTS),
    "head of another name": ("gpt_neox", {}),
}


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "adapter"])
@pytest.mark.parametrize("family", FAMILIES)
def test_merged_weights_are_those_of_the_files(tmp_path: Path, family: str, adapted: bool) -> None:
    kind, more = FAMILIES[family]
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **TINY | more)).save_pretrained(tmp_path / "m")
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    if adapted:
        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight)
    merged = {name: value.detach().clone() for name, value in merged_state_dict(base_with_adapters(model)).items()}
    (model.merge_and_unload() if adapted else model).save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert merged.keys() == saved.keys()
    for name, value in saved.items():
        assert torch.allclose(merged[name], value, atol=1e-6), name
