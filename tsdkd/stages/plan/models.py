"""Models as a plan knows them: configuration and tokenizer, without weights."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from tsdkd.core import Head
from tsdkd.stages.config.types import DType
from tsdkd.stages.models.config_files import translate_config_errors
from tsdkd.stages.models.device import auto_dtype, default_device
from tsdkd.stages.models.embedded import teacher_config_and_tokenizer
from tsdkd.stages.models.model_size import ModelSize, model_size
from tsdkd.stages.models.paths import model_directory
from tsdkd.stages.models.spec import load_config
from tsdkd.stages.models.tokenizers import load_tokenizer

TOKENIZER_FILES = ("*.json", "*.jinja", "*.model", "*.txt")
"""Patterns of the files to fetch from the hub."""


@dataclass(frozen=True)
class PlannedModel:
    """A model without its weights."""

    name: str
    config: PreTrainedConfig
    load_tokenizer: Callable[[], PreTrainedTokenizerBase]

    @cached_property
    def size(self) -> ModelSize:
        with translate_config_errors(self.name):
            return model_size(self.config)

    def renamed(self, name: str) -> "PlannedModel":
        return replace(self, name=name)

    def without_layers(self, count: int) -> "PlannedModel":
        """The model after `tsdkd prune` drops `count` layers."""
        config = deepcopy(self.config)
        text = config.get_text_config()
        text.num_hidden_layers -= count
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[: text.num_hidden_layers]
        return replace(self, config=config)

    def head(self, dtype: DType) -> Head:
        """A head of the model's shape and dtype, without values."""
        return Head(torch.empty(self.size.head_shape, dtype=self._torch_dtype(dtype), device="meta"))

    def weight_bytes(self, dtype: DType) -> int:
        return self.size.parameters * self._torch_dtype(dtype).itemsize

    def bytes_per_step(self, dtype: DType, responses: int, cached_tokens: float) -> float:
        """Bytes that a decoding step moves: the weights, and the cache of `cached_tokens` tokens per response."""
        width = self._torch_dtype(dtype).itemsize
        return width * self.size.matmul_parameters + responses * cached_tokens * self.size.kv_cache_bytes(width)

    def sequence_bytes(self, dtype: DType, tokens: int, logits: int) -> int:
        """Memory of one sequence in a forward pass, with `logits` positions of logits."""
        eager = default_device() == "cpu"  # as in `load_model`
        return self.size.sequence_bytes(self._torch_dtype(dtype).itemsize, tokens, logits, eager=eager)

    def _torch_dtype(self, dtype: DType) -> torch.dtype:
        name = auto_dtype(self.config, default_device()) if dtype == "auto" else dtype
        torch_dtype: torch.dtype = getattr(torch, name)
        return torch_dtype


def load_planned_model(name: str) -> PlannedModel:
    """A model directory or hub model; the tokenizer is fetched when it is needed. Raises InputError."""
    return PlannedModel(name, load_config(name), lambda: load_tokenizer(str(model_directory(name, TOKENIZER_FILES))))


def embedded_planned_model(name: str, dropped_layers: int) -> PlannedModel:
    """The embedded teacher without `dropped_layers` layers; the model need not exist yet."""
    config, tokenizer = teacher_config_and_tokenizer()
    return PlannedModel(name, config, lambda: tokenizer).without_layers(dropped_layers)


def path_key(path: str | Path) -> Path:
    """One key for all names of a path."""
    return Path(path).expanduser().absolute().resolve()
