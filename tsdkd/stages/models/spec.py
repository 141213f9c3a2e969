"""What is known of a model before its weights are loaded."""

from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase

from tsdkd.errors import InputError
from tsdkd.stages.models.adapters import base_model_name
from tsdkd.stages.models.context import context_length
from tsdkd.stages.models.device import auto_dtype, default_device
from tsdkd.stages.models.paths import model_directory
from tsdkd.stages.models.tokenizers import end_token_ids, load_tokenizer


@dataclass(frozen=True)
class ModelSpec:
    """A model, or a LoRA adapter with its base."""

    name: str
    directory: Path
    """Where the model lies: an adapter's base."""
    adapter: Path | None
    tokenizer: PreTrainedTokenizerBase
    context: int
    """The longest sequence it was made for, in tokens."""
    end_ids: list[int]
    """Ids that end a response."""
    dtype: str
    """Of its weights where nothing else is asked for, such as bfloat16."""


def load_spec(name: str) -> ModelSpec:
    """Raises InputError when there is no such model."""
    own, tokenizer = model_directory(name), load_tokenizer(name)
    base = base_model_name(own)
    directory = model_directory(base) if base else own
    try:
        config = AutoConfig.from_pretrained(directory)
        recorded = (directory / "generation_config.json").is_file()
        generation = (
            GenerationConfig.from_pretrained(directory) if recorded else GenerationConfig.from_model_config(config)
        )
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{name} has a config that transformers cannot read ({str(error).splitlines()[0]}).",
            "Check its config.json and generation_config.json.",
        ) from None
    end_ids = end_token_ids(generation, tokenizer)
    dtype = auto_dtype(config, default_device())
    return ModelSpec(name, directory, own if base else None, tokenizer, context_length(config), end_ids, dtype)
