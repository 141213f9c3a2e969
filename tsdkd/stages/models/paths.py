"""Where a model lies, by its name; loads without torch."""

from collections.abc import Sequence
from pathlib import Path

from tsdkd.artifacts.manifest import MANIFEST_FILE, load_manifest
from tsdkd.errors import ArtifactError, InputError
from tsdkd.stages.models.adapters import is_adapter

MODEL_FILES = ("*.json", "*.safetensors", "*.bin", "*.model", "*.jinja", "*.txt")
"""Files of a model that transformers may need."""


def model_directory(name: str, files: Sequence[str] = MODEL_FILES) -> Path:
    """The directory of a model: a local one, or a hub id's snapshot of `files`. Raises InputError."""
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file() and not is_adapter(path):
            raise InputError(
                f"{name} is no model: it has no config.json.", "Name a directory that transformers can load."
            )
        if (path / MANIFEST_FILE).is_file() and load_manifest(path).state != "complete":
            raise ArtifactError(f"{name} is not finished.", "Run the stage that writes it again, then name it.")
        return path
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise InputError(
            f"There is no model directory {name}.", "Name a model directory, or a hub id such as org/model."
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    try:
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{name} is no local model directory, and the hub did not give it ({reason}).",
            "Check the name and the network, or name a local directory.",
        ) from None
