"""Datasets of the Hugging Face hub, and local directories of datasets: downloaded once, then read from disk."""

import stat
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from tsdkd.artifacts.regular_files import require_regular_files
from tsdkd.errors import InputError, first_line


def file_mode(path: Path) -> int:
    """The mode of a file or directory; 0 if it does not exist or is not accessible."""
    try:
        return path.stat().st_mode
    except (OSError, ValueError):
        return 0


def read_hub_dataset(
    path: Path, config_name: str | None, split: str | None, columns: Collection[str]
) -> Iterator[dict[str, Any]]:
    """Rows of one split (default: train), memory-mapped; only `columns`, if the dataset has any of them.

    `path`: a directory, also one that `save_to_disk` wrote, or a hub id. Raises InputError.
    """
    name = str(path)
    mode = file_mode(path)
    if not stat.S_ISDIR(mode) and (mode or name.startswith(("/", ".", "~")) or name.count("/") != 1):
        raise InputError(
            f"{name} is neither a prompts file nor a dataset.",
            "Use a .jsonl, .json, .csv or .parquet file, a dataset's directory, or a hub id such as org/name.",
        )
    if mode:
        require_regular_files(path)
    import datasets

    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity_error()
    number = 0
    try:
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            rows = _saved_rows(path, config_name, split)
        else:
            rows = datasets.load_dataset(name, config_name, split=split or "train")
        chosen = [column for column in rows.column_names if column in columns]
        for row in rows.select_columns(chosen) if chosen else rows:
            number += 1
            yield row
    except InputError:
        raise
    except Exception as error:  # the hub, the network and the file formats raise errors of many types
        if isinstance(error, OSError) and _is_in_cache(error.filename):
            cause = f"The cache of datasets cannot be written ({error.strerror}: {error.filename})."
            raise InputError(cause, "Set HF_HOME and HF_DATASETS_CACHE to writable directories.") from None
        if isinstance(error, datasets.exceptions.DatasetGenerationError) and isinstance(error.__cause__, Exception):
            error = error.__cause__
        after = f" after row {number}" if number else ""
        raise InputError(
            f"The dataset {name} could not be read{after} ({first_line(error)}).",
            "Check the id, --config-name, --split and the network, or name a local file.",
        ) from None


def _is_in_cache(file: str | None) -> bool:
    """Whether a file is in a cache of the Hugging Face libraries, or is a directory above one."""
    import datasets
    import huggingface_hub

    caches = [Path(cache) for cache in (datasets.config.HF_DATASETS_CACHE, huggingface_hub.constants.HF_HOME)]
    return bool(file) and any(c.is_relative_to(str(file)) or Path(str(file)).is_relative_to(c) for c in caches)


def _saved_rows(path: Path, config_name: str | None, split: str | None) -> Any:
    """The rows of a directory that `save_to_disk` wrote. Raises InputError for another configuration or split."""
    import datasets

    if config_name:
        raise InputError(f"{path} is a saved dataset: it has no configurations.", "Leave out --config-name.")
    rows = datasets.load_from_disk(str(path))
    splits = rows if isinstance(rows, datasets.DatasetDict) else {str(rows.split or "train"): rows}
    chosen = split or (next(iter(splits)) if len(splits) == 1 else "train")
    if chosen not in splits:
        raise InputError(f"{path} has no split {chosen!r}.", f"Choose with --split one of: {', '.join(splits)}.")
    return splits[chosen]
