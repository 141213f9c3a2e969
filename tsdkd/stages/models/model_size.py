"""Parameters of a model, and the memory of its weights, caches and batches: arithmetic on configs."""

from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from tsdkd.stages.models.device import total_memory

BATCH_MEMORY_FRACTION = {"cuda": 0.7, "cpu": 0.25}
"""The largest fraction of the device's memory that a generating batch uses beside the weights."""
LARGEST_BATCH = {"cuda": 64, "cpu": 16}
"""Larger batches are not faster: generation copies the cache of the whole batch at every token."""


@dataclass(frozen=True)
class ModelSize:
    parameters: int
    matmul_parameters: int
    """Parameters that every token is multiplied with: all but an embedding that is only looked up."""
    lora_parameters: int
    """Parameters of LoRA adapters of rank 1 on all linear layers but the head."""


def model_size(config: PreTrainedConfig) -> ModelSize:
    """Counts parameters without allocating weights."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    parameters = sum(p.numel() for p in model.parameters())
    looked_up = 0 if head.weight is embedding.weight else embedding.weight.numel()
    return ModelSize(
        parameters=parameters,
        matmul_parameters=parameters - looked_up,
        lora_parameters=sum(m.in_features + m.out_features for m in linear),
    )


def kv_cache_bytes(config: PreTrainedConfig, itemsize: int) -> int:
    """Bytes of one token's keys and values; `itemsize` is the bytes of one number."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    head_width = getattr(text, "head_dim", None) or text.hidden_size // heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    return int(2 * text.num_hidden_layers * kv_heads * head_width * itemsize)


def sequence_bytes(config: PreTrainedConfig, itemsize: int, tokens: int, logits: int, *, eager: bool) -> int:
    """Bytes of one sequence in a forward pass without gradients: its cache, its largest layer, and its logits.

    `logits`: number of positions whose logits are formed. `eager`: attention weights are materialised.
    """
    text = config.get_text_config()
    logit_bytes = logits * text.vocab_size * (itemsize + 8)  # the logits, and their softmax in float32
    layer_bytes = tokens * itemsize * (8 * text.hidden_size + 3 * text.intermediate_size)
    attention_bytes = text.num_attention_heads * tokens * tokens * (itemsize + 4) if eager else 0
    return int(kv_cache_bytes(config, itemsize) * tokens + logit_bytes + layer_bytes + attention_bytes)


def fitting_batch_size(sequence: int, weights: int, device: str) -> int:
    """The largest power of two of sequences that fit in memory. `sequence`, `weights`: bytes of each."""
    fitting = max(1, int(BATCH_MEMORY_FRACTION[device] * (total_memory(device) - weights) / sequence))
    return min(LARGEST_BATCH[device], 1 << (fitting.bit_length() - 1))
