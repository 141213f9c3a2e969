"""Attention implementations of transformers: which are installed, and whether one computes a model's attention.

Some kernels ignore features that they do not support: sdpa ignores the soft-cap of Gemma 2 and VaultGemma.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_flash_attention_utils import FLASH_ATTENTION_COMPATIBILITY_MATRIX
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from tsdkd.errors import InputError, first_line
from tsdkd.stages.models.attributes import replaced_attribute
from tsdkd.stages.models.packed_attention import PACKED
from tsdkd.stages.models.spec import load_config
from tsdkd.stages.observer import Observer

EAGER = "eager"
"""Attention as the model's own code computes it, with all its features."""
PROBE_TOKENS = 32
PROBE_LOGITS = (16.0, 32.0, 64.0, 128.0)
"""Queries are scaled to logits of these sizes, so that a soft-cap changes them."""
TOLERANCE = 0.02
"""Allowed difference from eager attention, in units of the largest value: the rounding of 16-bit kernels."""


def require_attention(attention: str | None, models: Iterable[str]) -> None:
    """Raises InputError unless the implementation is known and installed, and these models support it."""
    if attention is None or attention == EAGER:
        return
    installed = _implementations()
    names = ", ".join(name if usable else f"{name} (not installed)" for name, usable in installed.items())
    if "/" in str(attention):
        raise InputError(
            f"--attention {attention} is custom code of the hub, which tsdkd does not run.", f"Choose from {names}."
        )
    if attention not in installed:
        raise InputError(f"--attention {attention} is unknown.", f"Choose from {names}.")
    if not installed[attention]:
        raise InputError(f"--attention {attention} is not installed.", f"Install {attention}, or leave it out.")
    for name in models:
        try:
            with torch.device("meta"):
                AutoModelForCausalLM.from_config(
                    load_config(name), attn_implementation=attention, dtype=torch.bfloat16, trust_remote_code=False
                )
        except (ValueError, ImportError) as error:
            raise InputError(
                f"{name} does not support {attention} attention ({first_line(error).split('. ')[0]}).",
                "Choose another --attention, or leave it out.",
            ) from None


def check_attention(name: str, model: PreTrainedModel, requested: str | None, observer: Observer) -> None:
    """Set eager attention, and warn, if the model's kernel computes another attention.

    Raises InputError if that kernel was requested.
    """
    kernel = _kernel(model)
    if kernel == EAGER:
        return
    try:
        difference = difference_from_eager(model, kernel)
    except (RuntimeError, ValueError, NotImplementedError, ImportError) as error:
        problem = f"does not run ({first_line(error)})"
    else:
        if difference <= TOLERANCE:
            return
        problem = f"computes another attention (values differ by {difference:.0%})"
    if requested:
        raise InputError(f"{kernel} {problem} for {name}.", "Choose another --attention, or leave it out.")
    model.set_attn_implementation(EAGER)
    observer.warning(f"{name} runs with eager attention: {kernel} {problem}.")


def _kernel(model: PreTrainedModel) -> str:
    return str(model.config.get_text_config()._attn_implementation)  # noqa: SLF001  # transformers has no other name


def _implementations() -> dict[str, bool]:
    """The names that transformers knows, and whether each is installed."""
    flash = {
        f"flash_attention_{version}": entry["general_availability_check"]()
        for version, entry in FLASH_ATTENTION_COMPATIBILITY_MATRIX.items()
    }
    names = [name for name in ALL_ATTENTION_FUNCTIONS.valid_keys() if "|" not in name and name != PACKED]
    return {name: bool(flash.get(name, True)) for name in sorted([EAGER, *names])}


@dataclass(frozen=True)
class _Call:
    """A call of eager attention in one layer."""

    inputs: tuple[Tensor, Tensor, Tensor]
    """Query, key and value: (batch, heads, seq, width)."""
    result: Any
    values: dict[float, Tensor]
    """The float32 results by the factor that scales the query."""


def difference_from_eager(model: PreTrainedModel, kernel: str) -> float:
    """The largest difference between a kernel and a model's eager attention, in units of the largest value.

    Eager attention reads `PROBE_TOKENS`. In every layer, the kernel then gets the same queries, keys and values.
    """
    calls: list[_Call] = []
    differences = [0.0]

    def record(function: Any, module: Any, *inputs: Any, **settings: Any) -> Any:
        factors = _factors(inputs[0], inputs[1], settings.get("scaling"))
        values = {factor: _in_float32(function, module, factor, inputs, settings) for factor in factors}
        result = function(module, *inputs, **settings)
        calls.append(_Call(inputs[:3], result, values))
        return result

    def compare(function: Any, module: Any, *inputs: Any, **settings: Any) -> Any:
        call = next(recorded)
        for factor, expected in call.values.items():
            values = _in_float32(function, module, factor, (*call.inputs, *inputs[3:]), settings)
            differences.append(float((values - expected).abs().max() / call.inputs[2].abs().max().clamp(min=1e-6)))
        return call.result

    with _restored_attention(model):
        model.set_attn_implementation(EAGER)
        _read_probe(model, record)
        model.set_attn_implementation(kernel)
        recorded = iter(calls)
        _read_probe(model, compare)
    return max(differences)


@contextmanager
def _restored_attention(model: PreTrainedModel) -> Iterator[None]:
    """Restores the implementation of each part of a model: those of a vision tower and of its text model differ."""
    configs = {id(part.config): part.config for part in model.modules() if isinstance(part, PreTrainedModel)}
    before = [(config, config._attn_implementation) for config in configs.values()]  # noqa: SLF001
    try:
        yield
    finally:
        for config, name in before:  # a config is set before its parts, which it changes too
            config._attn_implementation = name  # noqa: SLF001


def _read_probe(model: PreTrainedModel, call: Callable[..., Any]) -> None:
    """Read a few tokens; `call` gets each layer's attention function with its arguments."""
    find: Any = AttentionInterface.get_interface

    def get_interface(interface: Any, name: str, eager: Any) -> Any:
        return partial(call, find(interface, name, eager))

    device = model.get_input_embeddings().weight.device
    with torch.no_grad(), replaced_attribute(AttentionInterface, "get_interface", get_interface):
        model(input_ids=torch.arange(PROBE_TOKENS, device=device).unsqueeze(0), use_cache=False)


def _factors(query: Tensor, key: Tensor, scaling: float | None) -> set[float]:
    """1, and powers of two that bring the largest logit near each of `PROBE_LOGITS`."""
    keys = key.float().repeat_interleave(query.shape[1] // key.shape[1], 1)
    logits = query.float() @ keys.transpose(2, 3) * (scaling or query.shape[-1] ** -0.5)
    largest = float(logits.abs().max().clamp(min=1e-6))
    return {1.0, *(2.0 ** round(math.log2(logit / largest)) for logit in PROBE_LOGITS)}


def _in_float32(function: Any, module: Any, factor: float, inputs: tuple[Any, ...], settings: dict[str, Any]) -> Tensor:
    query, *others = map(_float, inputs)
    values: Tensor = function(module, query * factor, *others, **{name: _float(v) for name, v in settings.items()})[0]
    return values.float()


def _float(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
