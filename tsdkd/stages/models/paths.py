"""Resolves a model's name to a directory: a local one, or a download from the hub."""

from collections.abc import Sequence
from pathlib import Path

from tsdkd.artifacts.files import MANIFEST_FILE
from tsdkd.artifacts.manifest import load_manifest
from tsdkd.errors import ArtifactError, InputError, first_line
from tsdkd.stages.models.adapters import is_adapter
from tsdkd.stages.models.custom_code import require_native

MODEL_FILES = ("*.json", "*.safetensors", "*.bin", "*.model", "*.jinja", "*.txt")
"""Patterns of the files that transformers may need of a model."""


def model_directory(name: str, files: Sequence[str] = MODEL_FILES) -> Path:
    """A local model directory, or the local snapshot of a hub id; `files` are patterns of the files to download.

    Raises InputError if neither exists, ArtifactError for an unfinished checkpoint.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file() and not is_adapter(path):
            raise InputError(
                f"{name} is not a model directory: it has no config.json.",
                "Name a directory that transformers can load.",
            )
        if (path / MANIFEST_FILE).is_file() and load_manifest(path).state != "complete":
            raise ArtifactError(f"{name} is not finished.", "Run the stage that writes it again, then name it.")
        require_native(name, path)
        return path
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise InputError(
            f"The model directory {name} does not exist.", "Name a model directory, or a hub id such as org/model."
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    try:
        snapshot = Path(snapshot_download(name, allow_patterns=list(files)))
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError) as error:
        raise InputError(
            f"{name} is not a local model directory, and the hub did not provide it ({first_line(error)}).",
            "Check the name and the network, or name a local directory.",
        ) from None
    require_native(name, snapshot)
    return snapshot
