"""Shapes of a model, and the memory of its weights, caches and batches: counted on the model without weights."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tsdkd.stages.models.adaptable import adaptable_layers
from tsdkd.stages.models.device import total_memory
from tsdkd.stages.models.language_model import decoder_of
from tsdkd.stages.models.quantized import quantizable_layers
from tsdkd.stages.models.weights import without_weights

BATCH_MEMORY_FRACTION = {"cuda": 0.7, "cpu": 0.25}
"""The largest fraction of the device's memory that a generating batch uses beside the weights."""
LARGEST_BATCH = {"cuda": 64, "cpu": 16}
"""Larger batches are not faster: generation copies the cache of the whole batch at every token."""


@dataclass(frozen=True)
class ModelSize:
    parameters: int
    matmul_parameters: int
    """Parameters that every token is multiplied with: all but an embedding that is only looked up."""
    weight_shapes: tuple[tuple[tuple[int, ...], bool], ...]
    """Shapes of all weights, and whether each is looked up: an embedding, also one that is the head."""
    adapted_shapes: tuple[tuple[int, int], ...]
    """Shapes of the linear layers that get adapters: all but the head."""
    quantized_shapes: tuple[tuple[int, int], ...]
    """Shapes of the linear layers that are quantised."""
    head_shape: tuple[int, int]
    """Vocabulary and width of the output head's weight."""
    width: int
    """Of the hidden states between layers."""
    inner_widths: tuple[int, ...]
    """Of each layer: the widest input of its matrix products; for experts, the sum over those of one token."""
    attention_heads: int
    """Of one layer; 0 without attention."""
    attention_layers: int
    cache_numbers: int
    """Numbers that one token adds to the cache of keys and values."""

    @property
    def lora_parameters(self) -> int:
        """Parameters of LoRA adapters of rank 1 on all linear layers but the head."""
        return sum(map(sum, self.adapted_shapes))

    def kv_cache_bytes(self, itemsize: int) -> int:
        """Bytes of one token's keys and values; `itemsize` is the bytes of one number."""
        return self.cache_numbers * itemsize

    def sequence_bytes(self, itemsize: int, tokens: int, logits: int, *, eager: bool) -> int:
        """Bytes of one sequence in a forward pass without gradients: its cache, its largest layer, and its logits.

        `logits`: number of positions whose logits are formed. `eager`: attention weights are materialised.
        """
        logit_bytes = logits * self.head_shape[0] * (itemsize + 8)  # the logits, and their softmax in float32
        layer_bytes = tokens * itemsize * (8 * self.width + 3 * max(self.inner_widths, default=0))
        attention_bytes = self.attention_heads * tokens * tokens * (itemsize + 4) if eager else 0
        return self.kv_cache_bytes(itemsize) * tokens + logit_bytes + layer_bytes + attention_bytes


def model_size(config: PreTrainedConfig) -> ModelSize:
    """Counts parameters and shapes without allocating weights."""
    model = without_weights(config)
    head: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    parameters = sum(p.numel() for p in model.parameters())
    looked_up = 0 if head.weight is embedding.weight else embedding.weight.numel()
    looked_up_weights = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    text = config.get_text_config()
    width = int(getattr(text, "hidden_size", head.weight.shape[1]))
    layers = decoder_layers(model)
    cache = _cache_numbers(model, width, len(layers))
    attention_layers = sum(numbers > 0 for numbers in cache)
    return ModelSize(
        parameters=parameters,
        matmul_parameters=parameters - looked_up,
        weight_shapes=tuple((tuple(p.shape), id(p) in looked_up_weights) for p in model.parameters()),
        adapted_shapes=_shapes(m for m in adaptable_layers(model).values() if m is not head),
        quantized_shapes=_shapes(quantizable_layers(model).values()),
        head_shape=tuple(head.weight.shape),
        width=width,
        inner_widths=tuple(_inner_width(layer, width) for layer in layers),
        attention_heads=int(getattr(text, "num_attention_heads", 0)) if attention_layers else 0,
        attention_layers=attention_layers,
        cache_numbers=sum(cache),
    )


def parameter_count(config: PreTrainedConfig) -> int:
    return sum(p.numel() for p in without_weights(config).parameters())


def head_shape(config: PreTrainedConfig) -> tuple[int, int]:
    """Vocabulary and width of the output head's weight."""
    head: Any = without_weights(config).get_output_embeddings()
    return tuple(head.weight.shape)


def _shapes(layers: Iterable[Any]) -> tuple[tuple[int, int], ...]:
    """(out, in) of linear layers."""
    weights = ((layer.weight.T if isinstance(layer, Conv1D) else layer.weight) for layer in layers)
    return tuple((int(weight.shape[0]), int(weight.shape[1])) for weight in weights)


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The layers of a model's decoder: its list of modules with the most parameters."""
    lists = [module for module in decoder_of(model).modules() if isinstance(module, nn.ModuleList)]
    return list(max(lists, key=lambda layers: sum(p.numel() for p in layers.parameters()), default=[]))


def _cache_numbers(model: PreTrainedModel, width: int, layers: int) -> list[int]:
    """The numbers that one token adds to each layer's cache, from two forward passes on the meta device.

    A model that does not run there counts as multi-head attention of its width, the largest cache in use.
    """
    model.config.pad_token_id = None  # else some models look for padding among ids that do not exist
    model.eval()
    try:
        with torch.device("meta"), torch.no_grad():
            ids = torch.zeros(1, 2, dtype=torch.long)
            shorter, longer = (_cached(model(input_ids=ids[:, :length], use_cache=True)) for length in (1, 2))
    except Exception:  # custom forward passes read values, which the meta device does not have
        return [2 * width] * layers
    return [more - less for less, more in zip(shorter, longer, strict=True)]


def _cached(output: Any) -> list[int]:
    """Numbers in each layer's cache; a model without keys and values has none."""
    layers = getattr(output.get("past_key_values"), "layers", ())
    return [sum(v.numel() for v in vars(layer).values() if isinstance(v, torch.Tensor)) for layer in layers]


def _inner_width(layer: nn.Module, width: int) -> int:
    widths = [module.in_features for module in layer.modules() if isinstance(module, nn.Linear)]
    widths += [module.nx for module in layer.modules() if isinstance(module, Conv1D)]
    chosen = max((int(getattr(m, "top_k", 0) or 0) for m in layer.modules()), default=0)
    for module in layer.modules():
        experts = [p for p in module.parameters(recurse=False) if p.ndim == 3]  # (experts, rows, columns)
        if experts and chosen:
            widths.append(chosen * min(p.numel() // (len(p) * width) for p in experts))
    return max(widths, default=0)


def fitting_batch_size(sequence: int, weights: int, device: str) -> int:
    """The largest power of two of sequences that fit in memory. `sequence`, `weights`: bytes of each."""
    fitting = max(1, int(BATCH_MEMORY_FRACTION[device] * (total_memory(device) - weights) / sequence))
    return min(LARGEST_BATCH[device], 1 << (fitting.bit_length() - 1))
