"""The longest sequence that a model reads."""

from collections.abc import Iterable
from typing import Protocol

from transformers import PreTrainedConfig

from tsdkd.errors import InputError


class ModelWithContext(Protocol):
    """A `LanguageModel` or a `ModelSpec`."""

    @property
    def name(self) -> str: ...

    @property
    def context(self) -> int: ...


def context_length(config: PreTrainedConfig) -> int:
    """In tokens; 2**31 where the config sets no limit, as for recurrent models and Bloom."""
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None) or getattr(text, "max_seq_len", None)  # the second: MPT
    return max(int(positions), _scaled_positions(text, int(positions))) if positions else 2**31


def require_context(
    models: Iterable[ModelWithContext], tokens: int, limit: int | None = None, *, recorded: bool = False
) -> None:
    """Raises InputError for a model whose context is shorter than the longest prompt with its response, `tokens`.

    `limit` shortens the contexts, such as vLLM's max_model_len. `recorded`: the responses are recorded in rollouts.
    """
    reach, remedy = "can reach", "Lower --max-new-tokens or --max-prompt-tokens."
    if recorded:
        reach, remedy = "reach", "Choose a model with a longer context, or generate with a lower --max-new-tokens."
    for model in models:
        context = min(model.context, limit or model.context)
        if tokens > context:
            raise InputError(
                f"A prompt and its response {reach} {tokens} tokens; {model.name} reads {context}.", remedy
            )


def _scaled_positions(text: PreTrainedConfig, positions: int) -> int:
    """The positions that RoPE scaling extends a model to; 0 without scaling.

    `max_position_embeddings` is the extended length for llama3, longrope and Gemma3, and the original one for linear
    and dynamic scaling. With yarn, families differ.
    """
    rope = getattr(text, "rope_parameters", None) or {}
    by_layer_type = [value for value in rope.values() if isinstance(value, dict)]
    extended = [0]
    for parameters in by_layer_type or [rope]:
        kind, factor = parameters.get("rope_type"), parameters.get("factor") or 1
        if kind in {"linear", "dynamic"} and not text.model_type.startswith("gemma3"):
            extended.append(int(positions * factor))
        elif kind == "yarn":
            extended.append(int(parameters.get("original_max_position_embeddings", 0) * factor))
    return max(extended)
