"""Saving a model: its weights, with the config files of the model that it was made from."""

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy, deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from tsdkd.errors import TsdkdError, first_line
from tsdkd.stages.models.attributes import replaced_attribute
from tsdkd.stages.models.config_files import GENERATION_CONFIG
from tsdkd.stages.models.language_model import LanguageModel
from tsdkd.stages.models.tokenizers import end_token_ids

CONFIG = "config.json"
DTYPES = ("dtype", "torch_dtype")
"""The two names of the precision in a config."""
SET_ON_SAVING = (*DTYPES, "architectures", "transformers_version", "_name_or_path")


def save_model(
    config: PreTrainedConfig, weights: Mapping[str, Tensor], dtype: torch.dtype, source: Path, directory: Path
) -> None:
    """Write a model with this config and these weights, and load it again.

    `source`: the directory of the model that it was made from. Its generation config is copied, and settings of its
    config that `config` does not change stay as they are written there: transformers loads both with values that it
    refuses to save. Weights are saved in `dtype`, except those that the architecture keeps in float32.

    Raises TsdkdError if the model that is loaded has another config or other weights.
    """
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            deepcopy(config), dtype=dtype, trust_remote_code=False
        )
    weights = {name: weight.to(saved_dtype(model, name, weight, dtype)) for name, weight in weights.items()}
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    with weights_only(model):
        model.save_pretrained(directory)
    settings = _with_dtype(_settings(config, source), str(dtype).removeprefix("torch."))
    settings["architectures"] = [type(model).__name__]
    (directory / CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    if (source / GENERATION_CONFIG).is_file():
        shutil.copyfile(source / GENERATION_CONFIG, directory / GENERATION_CONFIG)
    _require_equal(directory, config, weights, dtype)


def save_end_ids(student: LanguageModel, source: Path, directory: Path) -> None:
    """Write the end tokens that a student learned into the generation config of its checkpoint, or of its adapter.

    `source`: the directory of the student, whose other settings the file keeps. Nothing changes for a student that
    learned its own end tokens alone.
    """
    model: Any = student.model
    own = end_token_ids(model.generation_config, student.tokenizer, student.vocab)
    if not (learned := [i for i in student.end_ids if i not in own]):
        return
    if (source / GENERATION_CONFIG).is_file():
        settings = json.loads((source / GENERATION_CONFIG).read_text())
    else:
        settings = GenerationConfig.from_model_config(model.config).to_diff_dict()
    settings["eos_token_id"] = [*own, *learned]
    (directory / GENERATION_CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


@contextmanager
def weights_only(model: Any) -> Iterator[None]:
    """Make `save_pretrained` write no config: transformers refuses to save some that it loads."""
    unsaved = copy(model.config)
    unsaved.save_pretrained = lambda *_, **__: None
    generation: Any = GenerationConfig()
    generation.save_pretrained = lambda *_, **__: None
    with replaced_attribute(model, "config", unsaved), replaced_attribute(model, "generation_config", generation):
        yield


def saved_dtype(model: PreTrainedModel, name: str, weight: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The precision that transformers gives a weight of a model which it loads in `dtype`."""
    if not weight.is_floating_point():
        return weight.dtype
    kept: dict[str, torch.dtype] = model._get_dtype_plan(dtype)  # noqa: SLF001
    return next((precision for part, precision in kept.items() if re.search(part.replace("*", ".*"), name)), dtype)


def _settings(config: PreTrainedConfig, source: Path) -> dict[str, Any]:
    """A config's settings as `source` writes them, with those that differ from its config."""
    written: dict[str, Any] = json.loads((source / CONFIG).read_text())
    before, now = (_as_json(each) for each in (AutoConfig.from_pretrained(source, trust_remote_code=False), config))
    if before["model_type"] != now["model_type"]:  # the text model of a larger model
        return now
    return {
        **{key: value for key, value in written.items() if key in now or key not in before},
        **{key: value for key, value in now.items() if key not in before or value != before[key]},
    }


def _with_dtype(settings: dict[str, Any], dtype: str) -> dict[str, Any]:
    """A config's settings with this precision, under the name that they use, in the parts of the model too."""
    parts = {
        key: _with_dtype(value, dtype)
        for key, value in settings.items()
        if isinstance(value, dict) and "model_type" in value
    }
    return settings | parts | dict.fromkeys(settings.keys() & DTYPES or ("dtype",), dtype)


def _as_json(config: PreTrainedConfig) -> dict[str, Any]:
    """A config's settings with the types that JSON returns."""

    def kept(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {key: kept(entry) for key, entry in value.items() if key not in SET_ON_SAVING}

    settings: dict[str, Any] = kept(json.loads(config.to_json_string(use_diff=False)))
    return settings


def _require_equal(
    directory: Path, config: PreTrainedConfig, weights: Mapping[str, Tensor], dtype: torch.dtype
) -> None:
    """Raises TsdkdError unless transformers loads this config and these weights from a directory."""
    try:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, trust_remote_code=False)
    except Exception as error:  # transformers and safetensors raise errors of many types
        raise _difference(f"it cannot be loaded: {first_line(error)}") from None
    loaded, settings, expected = model.state_dict(), _as_json(model.config), _as_json(config)
    for key in sorted(settings.keys() | expected.keys()):
        if settings.get(key) != expected.get(key):
            raise _difference(f"{key} is {settings.get(key)}, not {expected.get(key)}")
    for name in sorted(loaded.keys() | weights.keys()):
        if name not in loaded or name not in weights or not torch.equal(loaded[name], weights[name].to("cpu")):
            raise _difference(f"{name} differs")


def _difference(what: str) -> TsdkdError:
    return TsdkdError(
        f"The saved model differs from the one in memory ({what}).",
        "Use another model: transformers cannot save and reload this architecture.",
    )
