"""The weights of a model in memory, with its adapters merged."""

from typing import Any

from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion


def merged_state_dict(model: Any) -> dict[str, Tensor]:
    """The weights of a model with its adapters merged, under the names of the model's files."""
    weights = {name: value for name, value in model.state_dict().items() if ".lora_" not in name}
    for name, module in model.named_modules(remove_duplicate=False):
        if hasattr(module, "get_delta_weight"):
            (adapter,) = module.active_adapters
            base, path, parameter = module, name, getattr(module, "parameter_name", "weight")
            while hasattr(base, "base_layer"):
                base, path = base.base_layer, f"{path}.base_layer"
            weights[f"{path}.{parameter}"] = getattr(base, parameter) + module.get_delta_weight(adapter)
    tied = set(model.all_tied_weights_keys or ())
    merged = {name.replace(".base_layer", ""): value for name, value in weights.items() if name not in tied}
    return dict(revert_weight_conversion(model, merged))
