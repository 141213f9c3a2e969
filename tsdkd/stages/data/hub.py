"""Datasets of the Hugging Face hub, and local directories that hold one: downloaded once, then read from disk."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tsdkd.errors import InputError


def read_hub_dataset(place: Path, config_name: str | None, split: str | None) -> Iterator[dict[str, Any]]:
    """Rows of one split (default: train), memory-mapped. Raises InputError where there is no such dataset."""
    name = str(place)
    if not place.is_dir() and (place.exists() or name.startswith(("/", ".", "~")) or name.count("/") != 1):
        raise InputError(
            f"{name} is no prompts file I can read, and no dataset.",
            "Use a .jsonl, .json, .csv or .parquet file, a dataset's directory, or a hub id such as org/name.",
        )
    import datasets

    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity_error()
    try:
        rows = datasets.load_dataset(name, config_name, split=split or "train")
    except Exception as error:  # the hub, the network, and every file format raise their own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"The dataset {name} could not be read ({reason}).",
            "Check the id, --config-name, --split and the network, or name a local file.",
        ) from None
    yield from rows
