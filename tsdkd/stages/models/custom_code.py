"""Refuses models that need Python code of their own: tsdkd never runs it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tsdkd.errors import InputError

KERNELS = tuple(f"{prefix}{part}_implementation" for prefix in ("", "_") for part in ("attn", "experts"))
"""Keys of a config that name kernels; a name with a slash is a kernel of the hub."""


def require_native(name: str, directory: Path) -> None:
    """Raises InputError for a model whose config names classes or kernels that transformers does not implement."""
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return  # the caller reports an unreadable config
    for key, kernel in _kernels(config):
        raise custom_code_error(name, f"{key} is {kernel}")
    classes = config.get("auto_map") if isinstance(config, dict) else None
    if not isinstance(classes, dict):
        return
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    native = {"AutoConfig": CONFIG_MAPPING_NAMES, "AutoModelForCausalLM": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    for auto_class, known in native.items():
        if auto_class in classes and str(config.get("model_type")) not in known:
            raise custom_code_error(name, f"{auto_class} is {classes[auto_class]}")


def custom_code_error(name: str, code: str) -> InputError:
    return InputError(
        f"{name} needs custom code ({code}), which tsdkd does not run.",
        "Use a model and a tokenizer that transformers itself implements.",
    )


def _kernels(value: Any) -> Iterator[tuple[str, str]]:
    """The kernels of the hub that a config or a config inside it names, each with its key."""
    if not isinstance(value, dict):
        return
    for key, item in value.items():
        names = item.values() if isinstance(item, dict) and key in KERNELS else [item]
        yield from ((key, name) for name in names if key in KERNELS and "/" in str(name))
        yield from _kernels(item)
