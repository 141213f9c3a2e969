"""Compares directories, and determines the state of a stage's output."""

import hashlib
import json
import os
from pathlib import Path

from tsdkd.artifacts.files import CONFIG_FILE, JOURNAL_FILE, MANIFEST_FILE, TIMES_FILE


def tree_of(directory: Path) -> dict[str, str]:
    """The digest of every file below a directory, and "/" for a directory."""
    return {
        str(path.relative_to(directory)): "/" if path.is_dir() else _digest(path, directory)
        for path in sorted(directory.rglob("*"))
    }


def _digest(file: Path, directory: Path) -> str:
    """The digest of a file, without the times and paths of a trial."""
    if file.name in {JOURNAL_FILE, TIMES_FILE}:
        return "times"
    content = file.read_bytes()
    if file.name == CONFIG_FILE:
        content = content.replace(os.fsencode(directory), b"")
    return hashlib.sha256(content).hexdigest()


def output_state(directory: Path, output: str, older: dict[str, str], newer: dict[str, str]) -> str:
    """The state of the output between two runs: "none", "older", "newer", "partial", or a description of the fault.

    older, newer: trees of the directory before and after a run that nothing interrupts.
    """
    path = directory / output
    found = {output: _digest(path, directory)} if path.is_file() else {}
    if (path / MANIFEST_FILE).is_file():
        manifest = json.loads((path / MANIFEST_FILE).read_text())
        names = [f"{output}/{name}" for name in (MANIFEST_FILE, *(part["file"] for part in manifest["parts"]))]
        found = {
            name: _digest(directory / name, directory) if (directory / name).is_file() else "missing" for name in names
        }
        if manifest["state"] == "partial":
            digests = [part["sha256"] for part in manifest["parts"]]
            return "partial" if list(found.values())[1:] == digests else "a listed part is damaged"
    if not found:
        return "none"
    for name, tree in {"older": older, "newer": newer}.items():
        if found.items() <= tree.items():
            return name
    return "neither the older nor the newer output is whole"


def differences(expected: dict[str, str], found: dict[str, str]) -> list[str]:
    kinds = {
        "left": found.keys() - expected.keys(),
        "missing": expected.keys() - found.keys(),
        "differs": {name for name in expected.keys() & found.keys() if expected[name] != found[name]},
    }
    return [f"{kind}: {', '.join(sorted(names))}" for kind, names in kinds.items() if names]
