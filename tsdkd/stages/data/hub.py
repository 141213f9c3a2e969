"""Datasets of the Hugging Face hub, and local directories of datasets: downloaded once, then read from disk."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tsdkd.errors import InputError, first_line


def read_hub_dataset(path: Path, config_name: str | None, split: str | None) -> Iterator[dict[str, Any]]:
    """Rows of one split (default: train), memory-mapped. `path`: a directory, or a hub id. Raises InputError."""
    name = str(path)
    if not path.is_dir() and (path.exists() or name.startswith(("/", ".", "~")) or name.count("/") != 1):
        raise InputError(
            f"{name} is neither a prompts file nor a dataset.",
            "Use a .jsonl, .json, .csv or .parquet file, a dataset's directory, or a hub id such as org/name.",
        )
    import datasets

    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity_error()
    try:
        rows = datasets.load_dataset(name, config_name, split=split or "train")
    except Exception as error:  # the hub, the network and the file formats raise errors of many types
        raise InputError(
            f"The dataset {name} could not be read ({first_line(error)}).",
            "Check the id, --config-name, --split and the network, or name a local file.",
        ) from None
    yield from rows
