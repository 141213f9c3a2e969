"""Refuses models that need Python code of their own: tsdkd never runs it."""

import json
from pathlib import Path

from tsdkd.errors import InputError


def require_native(name: str, directory: Path) -> None:
    """Raises InputError for a model whose config names classes that transformers does not implement."""
    try:
        config = json.loads((directory / "config.json").read_text())
        classes, model_type = config["auto_map"], config["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        return  # no custom classes; the caller reports an unreadable config
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    native = {"AutoConfig": CONFIG_MAPPING_NAMES, "AutoModelForCausalLM": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    for auto_class, known in native.items():
        if auto_class in classes and model_type not in known:
            raise custom_code_error(name, f"{auto_class} is {classes[auto_class]}")


def custom_code_error(name: str, code: str) -> InputError:
    return InputError(
        f"{name} needs custom code ({code}), which tsdkd does not run.",
        "Use a model and a tokenizer that transformers itself implements.",
    )
