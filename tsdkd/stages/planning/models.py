"""Models of a plan: by name, as an earlier line will make them, or the embedded ones before they are made."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from tsdkd.core import Head
from tsdkd.stages.config import DType
from tsdkd.stages.embedded import peek
from tsdkd.stages.models import auto_dtype, default_device, load_tokenizer
from tsdkd.stages.places import resolve
from tsdkd.stages.sizes import Size, cache_bytes, config_of, sequence_bytes, size_of

TOKENIZER = ("*.json", "*.jinja", "*.model", "*.txt")
"""Files of a model on the hub."""


@dataclass(frozen=True)
class Model:
    """A model without its weights."""

    name: str
    config: PreTrainedConfig
    tokenizer: Callable[[], PreTrainedTokenizerBase]

    @cached_property
    def size(self) -> Size:
        return size_of(self.config)

    def named(self, name: str) -> "Model":
        """The same shape under another name."""
        return replace(self, name=name)

    def without_layers(self, count: int) -> "Model":
        config = deepcopy(self.config)
        config.num_hidden_layers -= count
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[: config.num_hidden_layers]
        return replace(self, config=config)

    def head(self, dtype: DType) -> Head:
        """Its shape and dtype."""
        shape = self.config.get_text_config()
        return Head(torch.empty(shape.vocab_size, shape.hidden_size, dtype=self._dtype(dtype), device="meta"))

    def weights(self, dtype: DType) -> int:
        """Bytes."""
        return self.size.parameters * self._dtype(dtype).itemsize

    def read_each_step(self, dtype: DType, responses: int, tokens: float) -> float:
        """Bytes that move for one more token of each response: the weights, and what is cached of so many tokens."""
        width = self._dtype(dtype).itemsize
        return width * self.size.multiplied + responses * tokens * cache_bytes(self.config, width)

    def sequence(self, dtype: DType, tokens: int, logits: int) -> int:
        """Bytes of one sequence that is read or answered."""
        eager = default_device() == "cpu"  # as `load_model` chooses
        return sequence_bytes(self.config, self._dtype(dtype).itemsize, tokens, logits, eager=eager)

    def _dtype(self, dtype: DType) -> torch.dtype:
        found: torch.dtype = getattr(torch, auto_dtype(self.config, default_device()) if dtype == "auto" else dtype)
        return found


def find(name: str) -> Model:
    """A model that is there, or on the hub: its config, and once it is wanted its tokenizer. Raises InputError."""
    return Model(name, config_of(name), lambda: load_tokenizer(str(resolve(name, TOKENIZER))))


def embedded(name: str, lacking: int) -> Model:
    """The embedded teacher, or with layers lacking the embedded student; made or not."""
    config, tokenizer = peek()
    return Model(name, config, lambda: tokenizer).without_layers(lacking)


def key(place: str | Path) -> Path:
    """Equal for names of one place."""
    return Path(place).expanduser().absolute().resolve()
