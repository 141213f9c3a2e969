"""What lies between two stages: a directory with `manifest.json` and the files it lists. Knows no torch.

A `writer.Writer` makes one; a `read` trusts nothing: kind, format, state, sizes, hashes and parents are checked before
a stage sees a row.

An artifact's *identity* is what it is made from: configuration, seed, parents, models, engine. Running a stage again
with the same identity resumes or does nothing; with another it refuses. Its *fingerprint* adds the content, and
children record it. Manifests hold no time: the same work gives the same bytes.
"""

import hashlib
import json
from pathlib import Path
from typing import Any


def json_digest(value: Any) -> str:
    """SHA-256 of a JSON-able value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_digest(path: Path) -> str:
    """Of a file; or of a directory, by the names and contents of its files, hidden ones aside."""
    if path.is_file():
        return file_digest(path)
    names = sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())
    return json_digest(
        [[name, file_digest(path / name)] for name in names if not any(p.startswith(".") for p in name.split("/"))]
    )
