"""Tiny models of many families."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.helpers.models import byte_tokenizer
from tsdkd.stages.models.language_model import LanguageModel

SIZES = {
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "max_position_embeddings": 128,
}
FAMILIES: dict[str, dict[str, object]] = {
    "llama": {},
    "llama4_text": {"num_local_experts": 2, "intermediate_size_mlp": 48},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8},
    "gemma3_text": {"query_pre_attn_scalar": 8},
    "mistral": {},
    "phi": {},
    "phi3": {},
    "granite": {"logits_scaling": 8.0, "embedding_multiplier": 12.0},
    "olmo": {},
    "olmo2": {},
    "cohere": {"logit_scale": 0.0625},
    "cohere2": {"logit_scale": 0.25},
}
PACKING_CASES: dict[str, dict[str, object]] = {
    "gemma2": {"sliding_window": 4, "attn_logit_softcapping": 2.0},
    "gemma3_text": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "mistral": {"sliding_window": 4},
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "cohere2": {"sliding_window": 4},
    "phi3": {"sliding_window": 4},
    "olmo3": {"sliding_window": 4},
    "llama4_text": {"attention_chunk_size": 4, "attn_temperature_tuning": False, "no_rope_layers": [1, 0]},
    "gpt2": {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4},
}
"""Settings for tests of packing: windows shorter than the sequences, soft-caps, sinks; no dropout."""
RECURRENT: dict[str, dict[str, object]] = {
    "mamba": {"state_size": 8},
    "rwkv": {},
    "recurrent_gemma": {},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},
    "jamba": {},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "qwen3_next": {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
}
"""Recurrent families, and hybrids of recurrent layers and attention."""


def tiny(family: str, dtype: torch.dtype = torch.float32, **more: object) -> LanguageModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(SIZES | FAMILIES.get(family, {}) | RECURRENT.get(family, {}) | more))
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    if (bias := getattr(model.get_output_embeddings(), "bias", None)) is not None:
        torch.nn.init.normal_(bias)
    return LanguageModel(family, model, byte_tokenizer())
