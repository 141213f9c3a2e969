"""What a model takes, and a sequence that passes through it, in bytes: arithmetic on configs, no weight is loaded."""

from dataclasses import dataclass

import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from tsdkd.errors import InputError
from tsdkd.stages.models.adapters import base_model_name
from tsdkd.stages.models.paths import model_directory

CONFIG_FILES = ("config.json", "adapter_config.json")
BATCH_MEMORY_FRACTION = {"cuda": 0.7, "cpu": 0.25}
"""Of the device's memory, what a batch of answers may take beside the weights."""
LARGEST_BATCH = {"cuda": 64, "cpu": 16}
"""More are not faster: generating copies the cache of the whole batch for every token."""


@dataclass(frozen=True)
class ModelSize:
    parameters: int
    multiplied: int
    """Of them, those that every token is multiplied with: not an embedding that is looked up and nothing else."""
    ends: int
    """Inputs plus outputs of the linear layers but the head, summed: what adapters of rank 1 would learn."""


def load_config(name: str) -> PreTrainedConfig:
    """A model's configuration, an adapter's base's; of the hub nothing else is fetched. Raises InputError."""
    directory = model_directory(name, CONFIG_FILES)
    base = base_model_name(directory)
    if base:
        return load_config(base)
    try:
        return AutoConfig.from_pretrained(directory)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(
            f"{name} has a config that transformers cannot read ({reason}).", "Check its config.json."
        ) from None


def model_size(config: PreTrainedConfig) -> ModelSize:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    linear = (m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head)
    parameters = sum(p.numel() for p in model.parameters())
    looked_up = 0 if head.weight is embedding.weight else embedding.weight.numel()
    return ModelSize(parameters, parameters - looked_up, sum(m.in_features + m.out_features for m in linear))


def kv_cache_bytes(config: PreTrainedConfig, width: int) -> int:
    """Keys and values of one token, `width` bytes a number."""
    shape = config.get_text_config()
    heads = shape.num_attention_heads
    head_width = getattr(shape, "head_dim", None) or shape.hidden_size // heads
    return int(
        2 * shape.num_hidden_layers * (getattr(shape, "num_key_value_heads", None) or heads) * head_width * width
    )


def sequence_bytes(config: PreTrainedConfig, width: int, tokens: int, logits: int, *, eager: bool) -> int:
    """Of one sequence without gradients: its cache, its largest layer, and the logits of as many positions."""
    shape = config.get_text_config()
    projected = logits * shape.vocab_size * (width + 8)  # logits, and their softmax in float32
    passing = tokens * width * (8 * shape.hidden_size + 3 * shape.intermediate_size)
    attention = shape.num_attention_heads * tokens * tokens * (width + 4) if eager else 0
    return int(kv_cache_bytes(config, width) * tokens + projected + passing + attention)


def fitting_batch_size(sequence: int, weights: int, device: str) -> int:
    """Sequences answered together, each of so many bytes beside the weights: a power of two."""
    fitting = max(1, int(BATCH_MEMORY_FRACTION[device] * (total_memory(device) - weights) / sequence))
    return min(LARGEST_BATCH[device], 1 << (fitting.bit_length() - 1))


def available_memory(device: str) -> int:
    return int(torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available)


def total_memory(device: str) -> int:
    return int(torch.cuda.mem_get_info()[1] if device == "cuda" else psutil.virtual_memory().total)
