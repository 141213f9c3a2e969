"""Refusals of directories that a run must not write, replace or extend."""

import os
from pathlib import Path

from tsdkd.artifacts.file_system import PROBES
from tsdkd.artifacts.files import LOCK_FILE, MANIFEST_FILE
from tsdkd.artifacts.locks import absolute_path, has_readers, registered_inputs
from tsdkd.artifacts.manifest import HUB_DATASET, Manifest, read_raw_manifest
from tsdkd.artifacts.replacing import pending_path
from tsdkd.errors import ArtifactError


def require_artifact(path: Path) -> None:
    """Raises ArtifactError for a path that exists and is no artifact, unless a stage was killed there at its start."""
    begun = {LOCK_FILE, *PROBES, f"{MANIFEST_FILE}.tmp"}
    if not path.exists() or (path / MANIFEST_FILE).exists():
        return
    if not path.is_dir() or {file.name for file in path.iterdir()} - begun:
        raise ArtifactError(f"{path} exists and is not an artifact.", "Choose another output directory.")


def require_other_inputs(path: Path, wanted: Manifest, overwrite: bool) -> None:
    """Raises ArtifactError if an input is the output, or lies inside it and would be deleted."""
    target = path.resolve()
    parents = [Path(p.path) if p.kind == HUB_DATASET else target / p.path for p in wanted.parents]
    for source in (*parents, *(Path(model.name) for model in wanted.models), *registered_inputs()):
        if not source.exists():
            continue
        locations = {source.resolve(), absolute_path(source)}
        if target in locations:
            raise ArtifactError(f"{path} is an input and the output.", "Choose another output directory.")
        outputs = (target, absolute_path(path), pending_path(target))
        if overwrite and any(location.is_relative_to(output) for location in locations for output in outputs):
            raise ArtifactError(
                f"The input {source} is inside {path}, which --overwrite replaces.",
                "Move the input, or choose another output directory.",
            )


def require_kind(path: Path, wanted: Manifest) -> None:
    """Raises ArtifactError for an artifact of another kind."""
    kind = read_raw_manifest(path).get("kind")
    if kind != wanted.kind:
        raise ArtifactError(
            f"{path} holds {kind}, not {wanted.kind}.", "Choose another output directory, or remove this one."
        )


def require_replaceable(path: Path) -> None:
    """Raises ArtifactError for an artifact that a process reads, and for one that cannot be renamed."""
    if has_readers(path):
        raise ArtifactError(
            f"{path} is being read by another process.", "Wait for it to end, or choose another output directory."
        )
    if path.resolve().is_mount():
        raise ArtifactError(
            f"{path} is a mount point, so --overwrite cannot replace it.",
            "Choose a directory inside it, or remove its content.",
        )


def require_own_files(path: Path) -> None:
    """Raises ArtifactError for a link to a file outside, through which a stage would write or delete there."""
    root = path.resolve()
    for directory, directories, files in os.walk(root):
        for entry in (Path(directory, name) for name in (*directories, *files)):
            if entry.is_symlink() and not Path(os.path.realpath(entry)).is_relative_to(root):
                raise ArtifactError(
                    f"{entry} links to a file outside its artifact.", "Remove it, or copy the file itself there."
                )
