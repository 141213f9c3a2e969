"""The config files of a model, which transformers reads and checks."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig

from tsdkd.errors import InputError

GENERATION_CONFIG = "generation_config.json"
MAX_REASON = 300
"""Characters of the longest reason that a cause quotes."""


@contextmanager
def translate_config_errors(name: str) -> Iterator[None]:
    """Turn the errors of transformers and huggingface_hub, which have many types, into InputError."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:MAX_REASON] or type(error).__name__
        raise InputError(
            f"{name} has a config that transformers cannot read ({reason}).",
            f"Check its config.json and {GENERATION_CONFIG}.",
        ) from None


def require_dropouts(name: str, config: PreTrainedConfig) -> None:
    """Raises InputError for a dropout that is no probability below 1, which would fail in training only."""
    for key, value in config.get_text_config().to_dict().items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if key.endswith(("dropout", "drop", "pdrop", "dropout_prob")) and number and not 0 <= value < 1:
            raise InputError(f"The config of {name} has {key} {value}.", "Write a number from 0 to below 1 there.")


def require_readable_config(name: str, directory: Path) -> None:
    """Raises InputError for a directory whose config.json transformers cannot read; it may have none."""
    if (directory / "config.json").is_file():
        with translate_config_errors(name):
            AutoConfig.from_pretrained(directory, trust_remote_code=False)
