"""The cache that a model keeps while it samples."""

from typing import Any

from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from tsdkd.errors import InputError


def can_roll_back(config: PreTrainedConfig) -> bool:
    """Whether tokens can be removed from a model's cache: it holds keys and values alone.

    False for models with a running state, such as Mamba, LFM2 and Qwen3-Next.
    """
    if _model_class(config)._is_stateful:  # noqa: SLF001  transformers has no public name for it
        return False
    layers = DynamicCache(config=config).layers
    return all(type(layer) in {DynamicLayer, DynamicSlidingWindowLayer} for layer in layers)


def require_padding_support(name: str, config: PreTrainedConfig) -> None:
    """Raises InputError for a model whose state also reads padding, so that a response depends on its batch."""
    model_class = _model_class(config)
    if config.model_type == "recurrent_gemma" or not model_class._supports_default_dynamic_cache():  # noqa: SLF001
        raise InputError(
            f"{name} is a {config.model_type} model, whose state reads padding: responses would depend on the batch.",
            "Use a model of another architecture.",
        )


def _model_class(config: PreTrainedConfig) -> Any:
    return AutoModelForCausalLM._model_mapping[type(config)]  # noqa: SLF001
