"""Shapes are counted on the model that transformers builds, not on names in its config."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from tests.helpers.models import byte_tokenizer
from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.config.train import LoRAConfig, OnlineConfig, TrainConfig
from tsdkd.stages.models.device import default_device, total_memory
from tsdkd.stages.models.language_model import LanguageModel
from tsdkd.stages.models.memory import estimate_training_memory
from tsdkd.stages.models.model_size import head_shape, model_size, parameter_count
from tsdkd.stages.models.new_adapters import add_lora

SHAPES: dict[str, tuple[int, int, int, int, int]] = {
    "llama": (2 * 32 * 128, 4096, 11008, 32, 32000),
    "qwen3_moe": (2 * 4 * 64, 2048, 8 * 768, 32, 151936),  # eight of 128 experts
    "mixtral": (2 * 8 * 128, 4096, 2 * 14336, 32, 32000),  # two of eight
    "deepseek_v3": (512 + 64, 7168, 18432, 128, 129280),  # one compressed latent for keys and values
    "gpt2": (2 * 768, 768, 4 * 768, 12, 50257),
    "gptj": (2 * 4096, 4096, 4 * 4096, 16, 50400),
    "gpt_bigcode": (2 * 64, 768, 4 * 768, 12, 50257),  # one head of keys and values
    "opt": (2 * 768, 768, 3072, 12, 50272),
    "bloom": (2 * 64, 64, 4 * 64, 8, 250880),
    "falcon": (2 * 64, 4544, 4 * 4544, 71, 65024),
    "mpt": (2 * 2048, 2048, 4 * 2048, 16, 50368),
    "mamba": (0, 768, 2 * 768, 0, 50280),
    "mamba2": (0, 4096, 2 * 4096, 0, 32768),
}
"""Of one layer, from the papers: numbers in the cache, width, inner width, heads; and the rows of the head."""


def config_of(architecture: str, **sizes: Any) -> PreTrainedConfig:
    return AutoConfig.for_model(architecture, num_hidden_layers=2, **sizes)


@pytest.mark.parametrize("architecture", SHAPES)
def test_shapes_of_an_architecture(architecture: str) -> None:
    cache, width, inner_width, heads, vocab = SHAPES[architecture]
    size = model_size(config_of(architecture))
    assert (size.cache_numbers, size.width, size.inner_widths) == (2 * cache, width, 2 * (inner_width,))
    assert (size.attention_heads, size.attention_layers) == (heads, 2 * (heads > 0))
    assert size.head_shape == head_shape(config_of(architecture)) == (vocab, width)
    assert size.parameters == parameter_count(config_of(architecture))


@pytest.mark.parametrize(
    ("architecture", "sizes"),
    [
        ("llama", {"num_key_value_heads": 8}),
        ("qwen2", {"num_key_value_heads": 8}),
        ("qwen3", {"num_key_value_heads": 8, "head_dim": 128}),
        ("gemma2", {"head_dim": 256}),
        ("gemma3_text", {"head_dim": 256}),
    ],
)
def test_estimates_of_dense_models_follow_from_their_configs(architecture: str, sizes: dict[str, int]) -> None:
    config = config_of(architecture, **sizes)
    width, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    head_width = getattr(config, "head_dim", None) or width // heads
    size = model_size(config)
    cache = 2 * 2 * config.num_key_value_heads * head_width * 2
    layer, attention = 100 * 2 * (8 * width + 3 * inner), heads * 100 * 100 * 6
    logits = 3 * config.vocab_size * 10
    assert size.kv_cache_bytes(2) == cache
    assert size.sequence_bytes(2, 100, 3, eager=True) == cache * 100 + logits + layer + attention
    tokens = 4 * 100
    train = TrainConfig(micro_batch_size=4, attention="eager")
    memory = estimate_training_memory(config, [config], 100, train, "bfloat16")
    trained = tokens * (2 * (8 * width + 4 * inner) + 16 * width) + tokens * 100 * heads * 10
    assert memory.activations == 2 * trained
    assert (memory.weights, memory.optimizer) == (size.parameters * 10, size.parameters * 8)
    assert memory.teacher == config.vocab_size * width * 2
    packed = replace(train, micro_batch_size=None, micro_batch_tokens=1000)  # of any length, and no scores are kept
    memory = estimate_training_memory(config, [config], 100, packed, "bfloat16")
    assert memory.activations == 2 * 1000 * (2 * (8 * width + 4 * inner) + 16 * width)


def test_vllm_takes_memory_beside_a_served_teacher() -> None:
    online = OnlineConfig(sampling=GenerateConfig(engine="vllm", memory_fraction=0.5))
    memory = estimate_training_memory(config_of("llama"), [], 100, TrainConfig(online=online), "float32")
    assert memory.teacher == int(0.5 * total_memory(default_device()))
    for place in ({"rollout_url": "http://127.0.0.1:8000"}, {"rollout_gpus": 1}):  # where no student learns
        config = TrainConfig(online=replace(online, **place))
        assert estimate_training_memory(config_of("llama"), [], 100, config, "float32").teacher == 0


TINY: dict[str, dict[str, int]] = {
    "llama": {},
    "gpt2": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "mamba": {"state_size": 8},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},
    "llama4_text": {"num_local_experts": 2, "intermediate_size_mlp": 48, "head_dim": 8},
}


@pytest.mark.parametrize("architecture", TINY)
def test_adapters_on_all_linear_layers_have_the_counted_parameters(architecture: str) -> None:
    """Also where layers are Conv1D, where peft refuses some, and where a router is a linear layer."""
    sizes = {"vocab_size": 264, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"intermediate_size": 48, "max_position_embeddings": 64}
    known = AutoConfig.for_model(architecture)
    config = config_of(architecture, **{k: v for k, v in sizes.items() if hasattr(known, k)} | TINY[architecture])
    torch.manual_seed(0)
    model = LanguageModel(architecture, AutoModelForCausalLM.from_config(config), byte_tokenizer())
    adapted = add_lora(model, LoRAConfig(rank=3), seed=0).model
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert trained == 3 * model_size(config).lora_parameters > 0
    assert torch.isfinite(adapted(input_ids=torch.arange(6)[None]).logits).all()


def test_conv1d_layers_are_lora_targets_by_name() -> None:
    config = config_of("gpt2", vocab_size=264, n_embd=32, n_head=4)
    model = LanguageModel("gpt2", AutoModelForCausalLM.from_config(config), byte_tokenizer())
    adapted = add_lora(model, LoRAConfig(targets="c_attn"), seed=0).model
    assert any("c_attn.lora_A" in name for name, _ in adapted.named_parameters())
