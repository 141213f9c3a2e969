"""Merged adapters give the trained model, in the files of a checkpoint and for vLLM during training."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from tests.helpers.models import byte_tokenizer
from tsdkd.errors import InputError
from tsdkd.stages.config.train import LoRAConfig
from tsdkd.stages.models.load import LanguageModel
from tsdkd.stages.models.lora import add_lora, base_with_adapters, merged_state_dict

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


LLAMA4 = {"intermediate_size_mlp": 32, "num_local_experts": 2, "head_dim": 8}
ZAMBA2 = {
    "layers_block_type": ["hybrid", "hybrid"], "hybrid_layer_ids": [0, 1], "num_mem_blocks": 1, "mamba_ngroups": 1,
    "mamba_d_state": 8, "mamba_headdim": 8, "n_mamba_heads": 8, "chunk_size": 8,
}  # fmt: skip
UNMERGEABLE: dict[str, tuple[str, dict[str, Any], str]] = {
    "one weight in several layers": ("zamba2", ZAMBA2, "shares the weight of .* between several layers"),
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
