"""The layers of a decoder, and the config of a model that keeps some of them."""

import re
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedConfig, PreTrainedModel

from tsdkd.errors import InputError, first_line
from tsdkd.stages.models.language_model import decoder_of

LAYER_INDICES = ("mlp_only_layers", "moe_layers", "attn_layer_indices", "full_attn_idxs", "hybrid_layer_ids")
"""Settings that list indices of layers."""
FIRST_LAYERS = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index", "max_window_layers")
"""Settings that count layers from the first one."""
OTHER_LISTS = re.compile("token_id|architectures|multipliers|limit$")
"""Names of settings whose entries are not layers, even if there are as many."""
POSITIONS = ("layer_idx", "layer_id", "layer_number", "layer_num")
"""Attributes of modules that hold the index of their layer."""


def drop_error(drop: int, model: str, layers: int) -> InputError:
    """The error for a --drop below 1, or of all layers."""
    return InputError(
        f"--drop is {drop}, but {model} has {layers} layers.", "Drop at least one layer and keep at least one."
    )


class DecoderLayers:
    """The layers of a model's decoder; `keep` selects the ones that run."""

    def __init__(self, name: str, model: PreTrainedModel) -> None:
        """Raises InputError unless the decoder has one list of layers."""
        self.name = name
        self.model = model
        path, layers = _layer_list(name, model)
        decoder = decoder_of(model)
        self._parent: Any = decoder.get_submodule(path.rpartition(".")[0])
        self._attribute = path.rpartition(".")[2]
        self._layers = list(layers)
        self._config = deepcopy(model.config)
        self._positions = [
            [(module, key) for module in layer.modules() for key in POSITIONS if vars(module).get(key) == i]
            for i, layer in enumerate(layers)
        ]

    def __len__(self) -> int:
        return len(self._layers)

    def keep(self, indices: Sequence[int]) -> None:
        """Make the model consist of these layers, and its config describe it."""
        setattr(self._parent, self._attribute, nn.ModuleList(self._layers[i] for i in indices))
        for position, i in enumerate(indices):
            for module, key in self._positions[i]:
                setattr(module, key, position)
        _describe(self.model.config, self._config, indices)

    @property
    def can_sample(self) -> bool:
        """Whether transformers can still sample: the cache of a hybrid model needs one layer of attention."""
        return _has_length(self.model.config) or not _has_length(self._config)

    def require_description(self) -> None:
        """Raises InputError unless the config can describe the model without each one of its layers.

        The model that transformers makes from such a config is compared with the layers that remain: their modules,
        the shapes of their weights and the settings that they read from the config.
        """
        own = [_properties(layer) for layer in self._layers]
        for dropped in range(len(self)):
            kept = [i for i in range(len(self)) if i != dropped]
            config = deepcopy(self._config)
            try:
                _describe(config, self._config, kept)
                with torch.device("meta"):
                    described = AutoModelForCausalLM.from_config(
                        type(config).from_dict(config.to_dict()), trust_remote_code=False
                    )
                difference = self._difference(described, {i: own[i] for i in kept})
            except Exception as error:  # configs and models raise errors of many types
                difference = first_line(error)
            if difference:
                raise InputError(
                    f"The config of {self.name} cannot describe the model without layer {dropped} ({difference}).",
                    "Use a teacher whose layers do not depend on their number.",
                )

    def _difference(self, described: PreTrainedModel, kept: dict[int, dict[str, Any]]) -> str | None:
        """How a model differs from the kept layers, whose properties are given; None if it does not."""
        _, layers = _layer_list(self.name, described)
        for (i, own), layer in zip(kept.items(), layers, strict=True):
            other = _properties(layer)
            for key in own | other:
                if own.get(key) != other.get(key):
                    return f"layer {i}: {key} would change from {own.get(key)} to {other.get(key)}"
        shapes, others = (_shapes_outside(model, self.name) for model in (self.model, described))
        return next((f"{key} would have another shape" for key in shapes if shapes[key] != others.get(key)), None)


def _layer_list(name: str, model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The path of the layers in the decoder, and the layers."""
    decoder = decoder_of(model)
    lists = {path: module for path, module in decoder.named_modules() if isinstance(module, nn.ModuleList)}
    number = model.config.get_text_config().num_hidden_layers
    candidates = {
        path: module
        for path, module in lists.items()
        if len(module) == number
        and any(module[0].children())
        and not any(path.startswith(f"{other}.") for other in lists)
    }
    if len(candidates) != 1:
        raise InputError(
            f"The decoder of {name} has {len(candidates)} lists of {number} layers.",
            "Use a model whose layers are one list, such as Llama, Qwen, Gemma or GPT-2.",
        )
    return next(iter(candidates.items()))


def _has_length(config: PreTrainedConfig) -> bool:
    """Whether a model's cache knows how many tokens it holds."""
    try:
        DynamicCache(config=config).get_seq_length()
    except ValueError:
        return False
    return True


def config_of_layers(config: PreTrainedConfig, kept: Sequence[int]) -> PreTrainedConfig:
    """The config of a model that has these layers of another."""
    described = deepcopy(config)
    _describe(described, config, kept)
    return described


def _describe(config: PreTrainedConfig, whole: PreTrainedConfig, kept: Sequence[int]) -> None:
    """Make a config describe a model of the layers `kept`; `whole` is the config of all layers."""
    text = config.get_text_config()
    for name, value in _settings(whole.get_text_config(), kept).items():
        setattr(text, name, value)


def _settings(config: PreTrainedConfig, kept: Sequence[int]) -> dict[str, Any]:
    """The settings that describe layers, for a model of the layers `kept`."""
    layers = config.num_hidden_layers
    values = dict(vars(config))
    if (step := values.get("decoder_sparse_step") or 1) > 1:  # every step-th layer has experts
        dense = {*values["mlp_only_layers"], *(i for i in range(layers) if (i + 1) % step)}
        values |= {"mlp_only_layers": sorted(dense), "decoder_sparse_step": 1}
    settings: dict[str, Any] = {"num_hidden_layers": len(kept)}
    for name, value in values.items():
        if name in LAYER_INDICES and value is not None:
            settings[name] = [kept.index(i) for i in value if i in kept]
        elif name in FIRST_LAYERS and value is not None:
            settings[name] = sum(i < value for i in kept)
        elif isinstance(value, list | tuple) and len(value) == layers and not OTHER_LISTS.search(name):
            settings[name] = type(value)(value[i] for i in kept)
        elif value != getattr(config, name):
            settings[name] = value
    return settings


def _properties(layer: nn.Module) -> dict[str, Any]:
    """The classes, shapes and plain attributes of a layer by name: what it computes with, except its weights."""
    properties: dict[str, Any] = {}
    for path, module in layer.named_modules():
        properties[f"{path}.class"] = type(module).__name__
        for key, value in vars(module).items():
            if _is_plain(value) and not key.startswith("_") and key not in (*POSITIONS, "training"):
                properties[f"{path}.{key}".strip(".")] = value
    shapes = {key: tuple(value.shape) for key, value in layer.state_dict().items()}
    return properties | shapes


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple | dict):
        return all(map(_is_plain, value.values() if isinstance(value, dict) else value))
    return value is None or isinstance(value, bool | int | float | str)


def _shapes_outside(model: PreTrainedModel, name: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights outside the layers, by name."""
    _, layers = _layer_list(name, model)
    inside = {id(value) for value in (*layers.parameters(), *layers.buffers())}
    weights = model.state_dict(keep_vars=True)
    return {key: tuple(value.shape) for key, value in weights.items() if id(value) not in inside}
