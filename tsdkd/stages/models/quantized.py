"""Frozen weights in 4 or 8 bits below trained adapters: QLoRA (Dettmers et al. 2023), by bitsandbytes.

A quantised model computes the same function in training, measurement and sampling: the product of the input with the
weights that its bits stand for, in the precision of the input.
"""

from collections.abc import Iterator
from functools import partial
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import BitsAndBytesConfig, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from tsdkd.stages.config.types import QuantizedBits
from tsdkd.stages.models.adaptable import adaptable_layers
from tsdkd.stages.models.weights import without_weights

BLOCK_4BIT, BLOCK_OF_SCALES = 64, 256
"""Weights that share a scale, and scales that share one of their own (double quantisation)."""
CODES_4BIT = 16 + 256 + 1
"""Numbers in float32 that every layer keeps: the values of 4 bits, those of a scale's 8 bits, and the scales' mean."""
WEIGHTS = {"Params4bit", "Int8Params"}
"""bitsandbytes' classes of quantised weights."""


def quantization_config(bits: QuantizedBits, dtype: torch.dtype, model: PreTrainedConfig) -> BitsAndBytesConfig:
    """transformers' settings for loading a model in `bits`. `dtype`: of the products."""
    architecture = without_weights(model)
    quantized = quantizable_layers(architecture)
    skipped = [name for name, m in architecture.named_modules() if _is_linear(m) and name not in quantized]
    if bits == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        llm_int8_skip_modules=skipped,  # transformers reads it for 4 bits, too
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def quantizable_layers(model: Any) -> dict[str, Any]:
    """The linear layers of a full model that are quantised, by their full names.

    Not the head, and not layers whose weights a model reads without calling them, such as Mamba's dt_proj: quantised
    weights have another shape or dtype there.
    """
    head = model.get_output_embeddings()
    return {name: layer for name, layer in adaptable_layers(model).items() if _is_linear(layer) and layer is not head}


def _is_linear(module: Any) -> bool:
    """Whether bitsandbytes quantises such a layer."""
    return type(module) in {nn.Linear, Conv1D}


def quantized_bytes(bits: QuantizedBits, rows: int, columns: int) -> int:
    """Bytes of a layer's quantised weight with its scales and, in 4 bits, its code tables."""
    if bits == "8bit":
        return rows * columns + 4 * rows
    blocks = ceil(rows * columns / BLOCK_4BIT)
    return ceil(rows * columns / 2) + blocks + 4 * (ceil(blocks / BLOCK_OF_SCALES) + CODES_4BIT)


def quantized_layers(model: Any) -> dict[str, Any]:
    """The linear layers with quantised weights, by their full names."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and type(module.weight).__name__ in WEIGHTS
    }


def unify_forward(model: Any) -> None:
    """Make quantised layers compute the same in every mode, before their first forward.

    bitsandbytes packs 4-bit weights of a CPU with AVX512_BF16 at a forward without gradients, and never unpacks them:
    from then on they pass no gradient, and dequantise to other values. In 8 bits it also rounds activations, which on
    a CPU happens in evaluation alone, and depends on the other rows of the batch.
    """
    for layer in quantized_layers(model).values():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
        else:
            layer.forward = partial(_int8_forward, layer)
    del model.config.quantization_config  # the config of the checkpoint is that of full weights


def dequantized_weight(layer: Any) -> Tensor:
    """The weight (out, in) that a layer's bits stand for."""
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight  # imports bitsandbytes

    weight: Tensor = dequantize_bnb_weight(layer.weight, getattr(layer, "state", None))
    return weight


def dequantized_tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    """The weights of the quantised layers by name, one at a time: bits have neither NaN nor infinity."""
    for name, layer in quantized_layers(model).items():
        yield f"{name}.weight", dequantized_weight(layer)


def _int8_forward(layer: Any, inputs: Tensor) -> Tensor:
    product: Tensor = _Int8Linear.apply(inputs, layer)  # type: ignore[no-untyped-call]
    return product


class _Int8Linear(torch.autograd.Function):
    """The product with a dequantised weight, which is formed again in the backward pass instead of kept."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, layer: Any) -> Tensor:
        ctx.layer, ctx.dtype = layer, inputs.dtype
        bias = None if layer.bias is None else layer.bias.to(inputs.dtype)
        return linear(inputs, dequantized_weight(layer).to(inputs.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0] @ dequantized_weight(ctx.layer).to(grads[0].dtype)
        return grad.to(ctx.dtype), None
