"""The weights of a model in memory, with its adapters merged."""

from typing import Any

from torch import Tensor
from transformers.pytorch_utils import Conv1D

from tsdkd.stages.models.quantized import dequantized_weight, quantized_layers


def merged_weights(model: Any, *, merge: bool = True) -> dict[str, Tensor]:
    """The weights of a model, sharded or not, with its adapters merged or left out, under the names in memory.

    Quantised weights are dequantised, on the CPU and in the model's precision: the weights that were trained with.
    """
    weights = {name: value for name, value in model.state_dict().items() if ".lora_" not in name}
    quantized = quantized_layers(model)
    for path, layer in quantized.items():
        others = {key: value for key, value in weights.items() if not key.startswith((f"{path}.weight", f"{path}.SCB"))}
        weights = others | {f"{path}.weight": dequantized_weight(layer).to("cpu", model.dtype)}
    for name, module in model.named_modules(remove_duplicate=False):
        if merge and hasattr(module, "get_delta_weight"):
            (adapter,) = module.active_adapters
            base, path, parameter = module, name, getattr(module, "parameter_name", "weight")
            while hasattr(base, "base_layer"):
                base, path = base.base_layer, f"{path}.base_layer"
            weight = weights[f"{path}.{parameter}"]
            weights[f"{path}.{parameter}"] = weight + module.get_delta_weight(adapter).to(weight.device)
    for path, layer in quantized.items():
        if layer.source_cls is Conv1D:  # quantised as (out, in)
            weights[f"{path}.weight"] = weights[f"{path}.weight"].T.contiguous()
    return {name.replace(".base_layer", ""): value for name, value in weights.items()}
