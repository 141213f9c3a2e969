"""SHA-256 of values, files and directories."""

import hashlib
import json
from pathlib import Path
from typing import Any

from tsdkd.artifacts.files import CONFIG_FILE, MANIFEST_FILE


def json_digest(value: Any) -> str:
    """SHA-256 of a JSON value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_digest(path: Path) -> str:
    """SHA-256 of a file; of a directory, by the names and contents of its files.

    Hidden files do not count, nor does an artifact's config.yaml.
    """
    if path.is_file():
        return file_digest(path)
    files = sorted((str(file.relative_to(path)), file) for file in path.rglob("*") if file.is_file())
    return json_digest([[name, file_digest(file)] for name, file in files if _counts(name, file)])


def _counts(name: str, file: Path) -> bool:
    hidden = any(part.startswith(".") for part in name.split("/"))
    return not (hidden or (file.name == CONFIG_FILE and file.with_name(MANIFEST_FILE).exists()))
