"""Tiny random models of many architectures. Their sizes use every feature, such as windows, experts and latents."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.helpers.models import byte_tokenizer

ROWS = 264
"""Rows of the output head; the last few are padding."""
END_ID = 257
SIZES: dict[str, Any] = {
    "vocab_size": ROWS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": 256,
    "eos_token_id": END_ID,
    "pad_token_id": END_ID,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_expand": 2}
SLIDING = {"sliding_window": 6}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama4_text": {"head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 48, "attention_chunk_size": 64},
    "mistral": SLIDING,
    "ministral": {"head_dim": 8},
    "mixtral": {"num_local_experts": 4},
    "qwen2": {},
    "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 16},
    "qwen3": {"head_dim": 8},
    "qwen3_moe": EXPERTS | {"head_dim": 8, "mlp_only_layers": [1]},
    "qwen3_next": EXPERTS
    | {
        "head_dim": 8,
        "num_hidden_layers": 4,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "shared_expert_intermediate_size": 16,
    },
    "gemma": {"head_dim": 8},
    "gemma2": SLIDING | {"head_dim": 8, "query_pre_attn_scalar": 8},
    "gemma3_text": SLIDING | {"head_dim": 8, "query_pre_attn_scalar": 8},
    "phi": {},
    "phi3": {},
    "smollm3": {"no_rope_layer_interval": 2},
    "olmo": {},
    "olmo2": {},
    "olmo3": SLIDING,
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "gpt2": {},
    "gpt_neo": {
        "attention_types": [[["global", "local"], 2]],
        "num_layers": 4,
        "num_hidden_layers": 4,
        "window_size": 6,
    },
    "gpt_neox": {},
    "gptj": {"rotary_dim": 4},
    "gpt_bigcode": {},
    "codegen": {"rotary_dim": 4},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "bloom": {},
    "falcon": {},
    "mpt": {},
    "mamba": {"state_size": 8},
    "mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
    "falcon_mamba": {"state_size": 8},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8},
    "jamba": {"num_experts": 2, "mamba_d_state": 8, "attn_layer_period": 2, "attn_layer_offset": 1},
    "bamba": MAMBA2 | {"attn_layer_indices": [1], "mamba_chunk_size": 8},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "attention_window_size": 16},
    "rwkv": {"attention_hidden_size": 32},
    "granite": {"logits_scaling": 8.0, "embedding_multiplier": 12.0},
    "granitemoe": {"num_local_experts": 4},
    "granitemoehybrid": MAMBA2
    | {"layer_types": ["mamba", "attention", "mamba"], "num_local_experts": 4, "shared_intermediate_size": 16},
    "cohere": {},
    "cohere2": SLIDING | {"head_dim": 8},
    "deepseek_v2": LATENT
    | {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_key_value_heads": 4},
    "deepseek_v3": LATENT
    | {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "num_key_value_heads": 4,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "gpt_oss": SLIDING | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"], "block_multiple_of": 8},
    "glm": {"head_dim": 8},
    "glm4": {"head_dim": 8},
    "starcoder2": {},
    "stablelm": {},
    "nemotron": {"head_dim": 8},
    "exaone4": {"head_dim": 8},
    "ernie4_5": {"head_dim": 8},
    "helium": {"head_dim": 8},
}


def save_model(name: str, directory: Path, seed: int) -> None:
    """A random model with values in every parameter: no bias is 0, no norm is 1."""
    torch.manual_seed(seed)
    known = AutoConfig.for_model(name)
    sizes = {field: value for field, value in SIZES.items() if hasattr(known, field)}  # configs keep unknown fields
    config = AutoConfig.for_model(name, **(sizes | ARCHITECTURES[name]))
    for field in config.to_dict():
        if "drop" in field and isinstance(getattr(config, field), float):
            setattr(config, field, 0.0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)


def reference(directory: Path) -> PreTrainedModel:
    """The model as transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
