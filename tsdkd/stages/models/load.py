"""Loads a causal language model by its name, and checks it."""

from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.utils import logging as hf_logging

from tsdkd.errors import InputError, TsdkdError, first_line
from tsdkd.stages.config.chat import ChatConfig
from tsdkd.stages.config.types import DType, QuantizedBits
from tsdkd.stages.models.allocator import keep_freed_memory
from tsdkd.stages.models.attention import check_attention
from tsdkd.stages.models.cache import padding_error, require_padding_support
from tsdkd.stages.models.config_files import GENERATION_CONFIG
from tsdkd.stages.models.device import auto_dtype, default_device
from tsdkd.stages.models.language_model import LanguageModel, not_finite_error
from tsdkd.stages.models.paths import base_directory, model_directory
from tsdkd.stages.models.quantized import dequantized_tensors, quantization_config, unify_forward
from tsdkd.stages.models.record import require_recorded_base
from tsdkd.stages.models.saved_adapters import attach_adapter
from tsdkd.stages.models.tokenizers import load_tokenizer
from tsdkd.stages.models.weights import loaded_tensors, record_tying, require_all_tensors, require_finite
from tsdkd.stages.observer import Observer, SilentObserver

hf_logging.disable_progress_bar()
hf_logging.set_verbosity_error()

PADDING_TOLERANCE = 0.01
"""Relative change of hidden states by other padding. Masked padding changes nothing but the rounding of 16 bits."""


def load_model(
    name: str,
    dtype: DType = "auto",
    device: str | None = None,
    device_map: str | dict[str, str] | None = None,
    attention: str | None = None,
    observer: Observer | None = None,
    chat: ChatConfig | None = None,
    quantize: QuantizedBits | None = None,
) -> LanguageModel:
    """Loads a model, or an adapter with its base model.

    Raises InputError if transformers cannot load it, if its files hold other tensors than its architecture, or values
    that are not finite in `dtype`.

    `dtype`: "auto" is the precision of the saved weights, or float32 on a device without bfloat16 (`auto_dtype`).
    `device_map`: transformers' argument, for a model that exceeds one device; without it the model is on `device`.
    `attention`: of transformers; None is eager on CPUs, else transformers' choice. `observer` receives a warning if
    eager attention replaces that choice, because it computes another attention than the model's. `chat`: as for
    `load_tokenizer`. `quantize`: bits of the linear layers but the head, whose weights cannot be trained then.
    """
    tokenizer, directory = load_tokenizer(name, chat), model_directory(name)
    base = base_directory(directory)
    device = device or default_device()
    if device == "cpu":
        keep_freed_memory()
        attention = attention or "eager"  # PyTorch's fused attention is slower in bfloat16 on CPUs
    try:
        source = str(base or name), base or directory
        model = _read_weights(*source, dtype, device, device_map, attention, quantize)
        if base:
            model = _with_adapter(model, directory, base)
    except InputError:
        raise
    except Exception as error:  # transformers, safetensors and peft raise errors of many types
        raise InputError(
            f"{name} is not a causal language model that transformers can load ({first_line(error)}).",
            "Check the directory: it needs config.json, weights and a tokenizer.",
        ) from None
    record_tying(model)
    model.eval()
    if device_map is None and quantize is None:
        model.to(device)
    require_finite(name, chain(loaded_tensors(model), dequantized_tensors(model)))
    loaded = LanguageModel(name, model, tokenizer)
    try:
        check_attention(name, model, attention, observer or SilentObserver())
        _check_hidden_states(loaded)
    except (TsdkdError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a config that contradicts the weights fails in a forward pass alone
        raise InputError(
            f"{name} cannot compute hidden states ({first_line(error)}).",
            "Check that its config.json belongs to its weights.",
        ) from error
    return loaded


def _read_weights(
    name: str,
    source: Path,
    dtype: DType,
    device: str,
    device_map: str | dict[str, str] | None,
    attention: str | None,
    quantize: QuantizedBits | None,
) -> Any:
    """The model in the directory `source`; `name`: in messages.

    Raises InputError for missing or other tensors, and transformers' errors.
    """
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    require_padding_support(name, config)  # before the weights are read
    if dtype == "auto" and device_map is None:
        dtype = auto_dtype(config, device)
    settings: dict[str, Any] = {"device_map": device_map}
    if quantize:
        if getattr(config, "quantization_config", None):
            raise InputError(f"{name} is quantised already.", "Name its full weights, or leave out --quantize.")
        settings["device_map"] = {"": torch.cuda.current_device() if device == "cuda" else device}
        settings["quantization_config"] = quantization_config(quantize, getattr(torch, dtype), config)
    model, report = AutoModelForCausalLM.from_pretrained(
        source,
        dtype=dtype,
        attn_implementation=attention,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        trust_remote_code=False,
        **settings,
    )
    require_all_tensors(name, model, report)
    if quantize:
        unify_forward(model)
    return model


def _with_adapter(model: Any, directory: Path, base: Path) -> Any:
    """The base model with an adapter and the adapter's generation config. Raises as `require_recorded_base`."""
    require_recorded_base(directory, base)
    model = attach_adapter(model, directory).get_base_model()
    if (directory / GENERATION_CONFIG).is_file():
        model.generation_config = GenerationConfig.from_pretrained(directory)
    return model


def _check_hidden_states(language_model: LanguageModel) -> None:
    """Raises an error if hidden states are not finite, or depend on the ids of padding and so on the batch."""
    tokens, padding = [0, 1, 2, 3], 3
    ids = torch.tensor([[1] * padding + tokens, [2] * padding + tokens], device=language_model.device)
    attention = torch.ones_like(ids)
    attention[:, :padding] = 0
    with torch.no_grad():
        first, second = language_model.hidden(ids, attention)[:, padding:].float()
    if not first.isfinite().all():
        raise not_finite_error(language_model.name, language_model.model.dtype)
    if (first - second).norm() > PADDING_TOLERANCE * first.norm():
        raise padding_error(language_model.name)
