"""SHA-256 of values, files and directories."""

import hashlib
import json
from pathlib import Path
from typing import Any


def json_digest(value: Any) -> str:
    """SHA-256 of a JSON value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_digest(path: Path) -> str:
    """SHA-256 of a file, or of a directory by the names and contents of its files without hidden ones."""
    if path.is_file():
        return file_digest(path)
    names = sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())
    visible = [name for name in names if not any(part.startswith(".") for part in name.split("/"))]
    return json_digest([[name, file_digest(path / name)] for name in visible])
