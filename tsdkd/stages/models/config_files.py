"""The config files of a model, which transformers reads and checks."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import AutoConfig

from tsdkd.errors import InputError

GENERATION_CONFIG = "generation_config.json"
MAX_REASON = 300
"""Characters of a library's reason that a cause quotes."""


@contextmanager
def readable_config(name: str) -> Iterator[None]:
    """Turns the errors of transformers and huggingface_hub, which are of many types, into InputError."""
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


def require_readable_config(name: str, directory: Path) -> None:
    """Raises InputError for a directory whose config.json transformers cannot read; it may have none."""
    if (directory / "config.json").is_file():
        with readable_config(name):
            AutoConfig.from_pretrained(directory, trust_remote_code=False)
