"""Models of a plan: by name, as an earlier line will make them, or the embedded ones before they are made."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from tsdkd.core import Head
from tsdkd.stages.config.types import DType
from tsdkd.stages.models.device import auto_dtype, default_device
from tsdkd.stages.models.embedded import teacher_config_and_tokenizer
from tsdkd.stages.models.paths import model_directory
from tsdkd.stages.models.sizes import ModelSize, kv_cache_bytes, model_size, sequence_bytes
from tsdkd.stages.models.spec import load_config
from tsdkd.stages.models.tokenizers import load_tokenizer

TOKENIZER = ("*.json", "*.jinja", "*.model", "*.txt")
"""Files of a model on the hub."""


@dataclass(frozen=True)
class PlannedModel:
    """A model without its weights."""

    name: str
    config: PreTrainedConfig
    tokenizer: Callable[[], PreTrainedTokenizerBase]

    @cached_property
    def size(self) -> ModelSize:
        return model_size(self.config)

    def named(self, name: str) -> "PlannedModel":
        """The same shape under another name."""
        return replace(self, name=name)

    def without_layers(self, count: int) -> "PlannedModel":
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
        return width * self.size.matmul_parameters + responses * tokens * kv_cache_bytes(self.config, width)

    def sequence(self, dtype: DType, tokens: int, logits: int) -> int:
        """Bytes of one sequence that is read or answered."""
        eager = default_device() == "cpu"  # as `load_model` chooses
        return sequence_bytes(self.config, self._dtype(dtype).itemsize, tokens, logits, eager=eager)

    def _dtype(self, dtype: DType) -> torch.dtype:
        found: torch.dtype = getattr(torch, auto_dtype(self.config, default_device()) if dtype == "auto" else dtype)
        return found


def find_planned_model(name: str) -> PlannedModel:
    """A model that is there, or on the hub: its config, and once it is wanted its tokenizer. Raises InputError."""
    return PlannedModel(name, load_config(name), lambda: load_tokenizer(str(model_directory(name, TOKENIZER))))


def embedded_planned_model(name: str, lacking: int) -> PlannedModel:
    """The embedded teacher, or with layers lacking the embedded student; made or not."""
    config, tokenizer = teacher_config_and_tokenizer()
    return PlannedModel(name, config, lambda: tokenizer).without_layers(lacking)


def path_key(place: str | Path) -> Path:
    """Equal for names of one place."""
    return Path(place).expanduser().absolute().resolve()
