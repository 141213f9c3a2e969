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
    """In tokens; 2**31 where the config sets no limit."""
    return int(getattr(config.get_text_config(), "max_position_embeddings", 2**31))


def require_context(models: Iterable[ModelWithContext], tokens: int, limit: int | None = None) -> None:
    """Raises InputError for a model whose context is shorter than the longest prompt with its response, `tokens`.

    `limit` shortens the contexts, such as vLLM's max_model_len.
    """
    for model in models:
        context = min(model.context, limit or model.context)
        if tokens > context:
            raise InputError(
                f"A prompt and its response can reach {tokens} tokens; {model.name} reads {context}.",
                "Lower --max-new-tokens or --max-prompt-tokens.",
            )
