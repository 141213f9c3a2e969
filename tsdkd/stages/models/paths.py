"""Resolves a model's name to a directory: a local one, or a download from the hub."""

from collections.abc import Sequence
from pathlib import Path

from tsdkd.artifacts.files import MANIFEST_FILE
from tsdkd.artifacts.locks import register_input
from tsdkd.artifacts.manifest import load_manifest
from tsdkd.artifacts.regular_files import require_regular_file, require_regular_files
from tsdkd.artifacts.replacing import restore_missing
from tsdkd.errors import ArtifactError, InputError, first_line
from tsdkd.stages.models.adapters import ADAPTER_CONFIG, BASE, adapter_settings, is_adapter
from tsdkd.stages.models.custom_code import require_native

TEXT_FILES = ("*.json", "*.jinja", "*.txt")
MAX_TEXT_FILE = 1 << 30
"""Bytes of the longest text file of a model; the vocabularies of 2026 have up to 40 million."""
MODEL_FILES = ("*.json", "*.safetensors", "*.bin", "*.model", "*.jinja", "*.txt")
"""Patterns of the files that transformers may need of a model."""


def model_directory(name: str, files: Sequence[str] = MODEL_FILES) -> Path:
    """A local model directory, or the local snapshot of a hub id; `files` are patterns of the files to download.

    Raises InputError if neither exists, ArtifactError for an unfinished checkpoint.
    """
    if "\0" in name:  # from a file of options
        raise InputError(f"{name} is no name of a model: it contains a zero byte.", "Correct the name.")
    path = Path(name).expanduser()
    restore_missing(path)
    if path.is_dir():
        register_input(path)
        if not (path / "config.json").is_file() and not is_adapter(path):
            raise InputError(
                f"{name} is not a model directory: it has no config.json.",
                "Name a directory that transformers can load.",
            )
        if (path / MANIFEST_FILE).is_file() and load_manifest(path).state != "complete":
            raise ArtifactError(f"{name} is not finished.", "Run the stage that writes it again, then name it.")
        _require_usable(name, path)
        return path
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise InputError(
            f"The model directory {name} does not exist.", "Name a model directory, or a hub id such as org/model."
        )
    return _hub_snapshot(name, files)


def _hub_snapshot(name: str, files: Sequence[str], revision: str | None = None) -> Path:
    """`revision`: None is the newest. Raises InputError."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    try:
        snapshot = Path(snapshot_download(name, revision=revision, allow_patterns=list(files)))
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError) as error:
        raise InputError(
            f"{name} is not a local model directory, and the hub did not provide it ({first_line(error)}).",
            "Check the name and the network, or name a local directory.",
        ) from None
    require_native(name, snapshot)
    return snapshot


def _require_usable(name: str, directory: Path) -> None:
    """Raises InputError for a file that never ends or fills the memory, and for a model that needs custom code."""
    require_regular_files(directory)
    for file in (file for pattern in TEXT_FILES for file in directory.glob(pattern) if file.is_file()):
        require_regular_file(file, "model's file", MAX_TEXT_FILE)
    require_native(name, directory)


def base_directory(adapter: Path, files: Sequence[str] = MODEL_FILES) -> Path | None:
    """The directory of an adapter's base model, or its local snapshot; None for a directory that holds a whole model.

    A relative path is looked up beside the adapter and in the directories above it, never in the working directory,
    where another model may have its name. Raises InputError without exactly one such model.
    """
    if not is_adapter(adapter):
        return None
    settings = adapter_settings(adapter)
    name = str(settings[BASE])
    remedy = f"write its path or its hub id into {adapter / ADAPTER_CONFIG}, as {BASE}"
    path = Path(name).expanduser()
    candidates = [path] if path.is_absolute() else [parent / path for parent in (adapter, *adapter.resolve().parents)]
    local = sorted({candidate.resolve() for candidate in candidates if (candidate / "config.json").is_file()})
    if len(local) > 1:
        raise InputError(
            f"{adapter} names its base model {name}, and both {local[0]} and {local[1]} match.",
            f"Choose one: {remedy}.",
        )
    for base in local:
        if is_adapter(base):
            raise InputError(
                f"{adapter} names {name} as its base model, which is an adapter itself.",
                f"Name a whole model: {remedy}.",
            )
        register_input(base)
        _require_usable(str(base), base)
    try:
        return local[0] if local else _hub_snapshot(name, files, settings.get("revision"))
    except InputError as error:
        raise InputError(
            f"The base model of {adapter} is missing: {error.cause}",
            f"Put the base model, or a symbolic link to it, at {name}, or {remedy}.",
        ) from None
