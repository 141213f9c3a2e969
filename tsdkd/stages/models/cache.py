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
    """Raises InputError for an architecture whose state also reads padding, so that a response depends on its batch.

    Also for an architecture without a causal language model, such as T5.
    """
    if type(config) not in AutoModelForCausalLM._model_mapping:  # noqa: SLF001
        raise InputError(
            f"{name} is a {config.model_type} model, which is not a causal language model that transformers can load.",
            "Use a model that writes text from left to right.",
        )
    if config.model_type == "recurrent_gemma" or not _model_class(config)._supports_default_dynamic_cache():  # noqa: SLF001
        raise padding_error(name)


def padding_error(name: str) -> InputError:
    return InputError(
        f"{name} reads padding: its layers ignore the attention mask.",
        "Use an architecture that masks padding; RWKV, xLSTM and RecurrentGemma do not.",
    )


def _model_class(config: PreTrainedConfig) -> Any:
    return AutoModelForCausalLM._model_mapping[type(config)]  # noqa: SLF001
