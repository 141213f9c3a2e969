"""What is known of a model before its weights are loaded."""

from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase

from tsdkd.errors import InputError
from tsdkd.stages.adapters import base_of
from tsdkd.stages.models import auto_dtype, context_of, default_device, end_ids_of, load_tokenizer
from tsdkd.stages.places import resolve


@dataclass(frozen=True)
class Outline:
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


def outline(name: str) -> Outline:
    """Raises InputError when there is no such model."""
    own, tokenizer = resolve(name), load_tokenizer(name)
    base = base_of(own)
    directory = resolve(base) if base else own
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
    end_ids = end_ids_of(generation, tokenizer)
    dtype = auto_dtype(config, default_device())
    return Outline(name, directory, own if base else None, tokenizer, context_of(config), end_ids, dtype)
