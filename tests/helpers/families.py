"""Tiny models of many families."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.helpers.models import byte_tokenizer
from tsdkd.stages.models.load import LanguageModel

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


def tiny(family: str, dtype: torch.dtype = torch.float32, **more: object) -> LanguageModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(SIZES | FAMILIES.get(family, {}) | more))
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    if (bias := getattr(model.get_output_embeddings(), "bias", None)) is not None:
        torch.nn.init.normal_(bias)
    return LanguageModel(family, model, byte_tokenizer())
