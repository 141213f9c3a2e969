"""Loads run directories: manifests, sessions and training logs, of complete and partial artifacts. Hashes no part."""

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tsdkd.artifacts.files import MANIFEST_FILE, TIMES_FILE
from tsdkd.artifacts.journal import Session, read_sessions
from tsdkd.artifacts.json_files import read_json
from tsdkd.artifacts.locks import is_locked, register_input
from tsdkd.artifacts.manifest import MADE_BY, Manifest, load_manifest
from tsdkd.artifacts.reader import Artifact, check_parents
from tsdkd.errors import ArtifactError, InputError
from tsdkd.stages.methods import METHODS
from tsdkd.stages.metrics.log import METRICS_FILE, read_log
from tsdkd.stages.results.model_names import model_sort_key, shorten_paths

LOG_FILES = (METRICS_FILE, f"resume/{METRICS_FILE}")
"""The log of a complete checkpoint, and of one that is still training."""
MAX_DEPTH = 3
"""Directory levels below a run that may hold its artifacts."""


@dataclass(frozen=True, slots=True)
class RunArtifact:
    """One artifact of a run, complete or not."""

    name: str
    """Its path relative to the run, such as "rollouts" or "results/student"."""
    path: Path
    manifest: Manifest
    sessions: tuple[Session, ...]
    locked: bool
    """A running stage is writing the artifact."""
    bytes: int
    """On disk."""

    @property
    def kind(self) -> str:
        return self.manifest.kind

    @property
    def complete(self) -> bool:
        return self.manifest.state == "complete"

    @property
    def readable(self) -> bool:
        return self.complete and not self.missing_files

    @property
    def missing_files(self) -> list[str]:
        return [part.file for part in self.manifest.parts if not (self.path / part.file).is_file()]

    @property
    def stage(self) -> str:
        """The command that writes the artifact, such as "tsdkd train"."""
        return "tsdkd prune" if "drop" in self.manifest.config else MADE_BY[self.kind]

    @property
    def uses_teacher(self) -> bool:
        """False if a method learns from responses alone, without a teacher signal."""
        method = METHODS.get(self.manifest.config.get("method", ""))
        return method is None or method.needs_teacher

    @property
    def log(self) -> list[dict[str, float]]:
        """The training log, one entry per step or measurement, without an incomplete last line."""
        for name in LOG_FILES:
            if (self.path / name).is_file():
                entries = read_log(self.path / name)
                return entries if self.uses_teacher else [_without_teacher(entry) for entry in entries]
        return []

    @property
    def step_times(self) -> list[dict[str, float]]:
        """The seconds of each part of a training step, and of the "whole"."""
        file = self.path / TIMES_FILE
        return read_log(file) if file.is_file() else []

    @property
    def problems(self) -> list[str]:
        """Sentences about missing files, changed parents and an incomplete artifact."""
        problems = []
        if not self.complete:
            parts = f"{len(self.manifest.parts)} parts so far"
            remedy = "a stage is writing it" if self.locked else f"run `{self.stage}` again"
            problems.append(f"incomplete ({parts}); {remedy}.")
        problems += [f"{file} is missing." for file in self.missing_files]
        run = self.path.parents[self.name.count("/")]
        for parent, exists, unchanged in check_parents(self.path, self.manifest, run):
            if unchanged is False:
                state = "has changed since" if exists else "is missing"
                problems.append(f"its parent {parent.path} ({parent.kind}) {state}.")
        return problems

    def as_artifact(self) -> Artifact:
        return Artifact(self.path, self.manifest)


@dataclass(frozen=True, slots=True)
class Run:
    """A run directory with its artifacts, in the order of the stages."""

    name: str
    path: Path
    artifacts: tuple[RunArtifact, ...]

    def of_kind(self, kind: str) -> list[RunArtifact]:
        return [artifact for artifact in self.artifacts if artifact.kind == kind]

    def named(self, name: str) -> RunArtifact | None:
        return next((artifact for artifact in self.artifacts if artifact.name == name), None)

    @property
    def trained(self) -> list[RunArtifact]:
        """Checkpoints of `tsdkd train`; `tsdkd prune` writes checkpoints too."""
        return [artifact for artifact in self.of_kind("checkpoint") if "objective" in artifact.manifest.config]


def load_runs(directories: Sequence[Path]) -> list[Run]:
    """The runs in these directories; a directory of runs stands for its runs. Raises InputError without a run."""
    paths = [run for directory in directories for run in _run_directories(directory)]
    if len({path.resolve() for path in paths}) < len(paths):
        raise InputError("A run is named twice.", "Name every run once.")
    return [Run(name, path, _load_artifacts(path)) for name, path in zip(shorten_paths(paths), paths, strict=True)]


def _run_directories(directory: Path) -> list[Path]:
    if _is_artifact_manifest(directory / MANIFEST_FILE):
        raise InputError(f"{directory} is an artifact, not a run.", f"Name its run directory: {directory.parent}.")
    if not directory.is_dir():
        raise InputError(
            f"The run directory {directory} does not exist.", "Name one that `tsdkd generate` or another stage wrote."
        )
    if _manifest_files(directory, 1) or _manifest_files(directory / "results", 1):
        return [directory]
    runs = [path for path in directory.iterdir() if not _is_hidden(path.name) and _manifest_files(path, 1)]
    if not runs:
        raise InputError(f"{directory} holds no artifact.", "Name a run that `tsdkd generate` or another stage wrote.")
    return sorted(runs, key=lambda path: (len(path.name), path.name))  # 2 before 10


def _manifest_files(directory: Path, max_depth: int) -> list[Path]:
    """Manifests of artifacts below a directory, without hidden directories and other programs' manifests."""
    files = [file for depth in range(1, max_depth + 1) for file in directory.glob(f"{'*/' * depth}{MANIFEST_FILE}")]
    return [
        file
        for file in files
        if not any(map(_is_hidden, file.parent.relative_to(directory).parts)) and _is_artifact_manifest(file)
    ]


def _is_hidden(name: str) -> bool:
    return name.startswith(".")


def _is_artifact_manifest(file: Path) -> bool:
    try:
        raw = read_json(file)
    except OSError:
        return False
    except ArtifactError:
        return True  # load_manifest then reports the error
    return isinstance(raw, dict) and {"format", "kind"} <= raw.keys()


def _load_artifacts(run: Path) -> tuple[RunArtifact, ...]:
    artifacts = [_load_artifact(run, file.parent) for file in _manifest_files(run, MAX_DEPTH)]
    return tuple(sorted(artifacts, key=_sort_key))


def _sort_key(artifact: RunArtifact) -> tuple[int, int, int, str]:
    order, _ = model_sort_key(artifact.path)
    return list(MADE_BY).index(artifact.kind), artifact.name.count("/"), order, artifact.name


def _load_artifact(run: Path, path: Path) -> RunArtifact:
    if load_manifest(path).state == "complete":  # locks it, so no run replaces it meanwhile
        register_input(path)
    manifest, sessions = load_manifest(path), tuple(read_sessions(path))
    return RunArtifact(str(path.relative_to(run)), path, manifest, sessions, is_locked(path), _disk_bytes(path))


def _disk_bytes(path: Path) -> int:
    """Bytes below a directory; skips files that a running stage removes meanwhile."""
    total = 0
    for directory, _, names in os.walk(path):
        for name in names:
            with suppress(OSError):
                total += Path(directory, name).stat().st_size
    return total


def _without_teacher(entry: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in entry.items() if name != "teacher_entropy"}
