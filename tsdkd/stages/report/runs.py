"""What run directories hold, finished or not, as plain records; files are trusted to be what manifests say."""

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tsdkd.artifacts.journal import Session, read_sessions
from tsdkd.artifacts.manifest import MANIFEST_FILE, Manifest, load_manifest
from tsdkd.artifacts.reader import Artifact, check_parents
from tsdkd.artifacts.writer import is_locked
from tsdkd.errors import InputError
from tsdkd.stages.methods import METHODS
from tsdkd.stages.results.compare import MODEL_ORDER, shorten_paths

STAGES = {"rollouts": "generate", "scores": "score", "checkpoint": "train", "results": "eval"}
"""What to run for a kind, in order."""
METRICS = ("metrics.jsonl", "resume/metrics.jsonl")
"""Where a checkpoint has its log: finished, or on its way."""
DEEPEST = 3
"""Folders below a run in which its artifacts lie."""
LEARNED_BY_HEART = {"eval_kl": "eval_cross_entropy"}
"""What the log calls otherwise than it is, without a teacher's view: that is then the answer itself."""


@dataclass(frozen=True, slots=True)
class RunArtifact:
    """One artifact of a run."""

    name: str
    """Its place in the run, such as "rollouts" or "results/student"."""
    path: Path
    manifest: Manifest
    sessions: tuple[Session, ...]
    busy: bool
    """A stage is writing it."""
    bytes: int
    """On disk."""

    @property
    def kind(self) -> str:
        return self.manifest.kind

    @property
    def complete(self) -> bool:
        return self.manifest.state == "complete"

    @property
    def artifact(self) -> Artifact:
        return Artifact(self.path, self.manifest)

    @property
    def log(self) -> list[dict[str, float]]:
        """Of training, a record per step or measurement; a line that is being written is left out."""
        for name in METRICS:
            if (self.path / name).is_file():
                lines = (self.path / name).read_text().splitlines(keepends=True)
                entries = [json.loads(line) for line in lines if line.endswith("\n")]
                return [_without_teacher(entry) for entry in entries] if self.by_heart else entries
        return []

    @property
    def by_heart(self) -> bool:
        """Did a student learn from answers alone, without a teacher's view of them?"""
        objective = METHODS.get(self.manifest.config.get("method", ""))
        return objective is not None and not objective.teacher

    @property
    def faults(self) -> list[str]:
        """What is not as it should be with the artifact, its files and its parents."""
        found = []
        if not self.complete:
            state = "is being written" if self.busy else f"is not finished; run `{self.stage}` again"
            found.append(f"{state}: {len(self.manifest.parts)} parts so far.")
        found += [f"{file} is missing." for file in self.absent]
        for parent, there, same in check_parents(self.path, self.manifest):
            if not same:
                state = "changed since" if there else "are not there any more"
                found.append(f"The {parent.kind} it was made from {state} ({parent.path}).")
        return found

    @property
    def absent(self) -> list[str]:
        """Files that the manifest lists."""
        return [part.file for part in self.manifest.parts if not (self.path / part.file).is_file()]

    @property
    def readable(self) -> bool:
        return self.complete and not self.absent

    @property
    def stage(self) -> str:
        return "tsdkd prune" if "drop" in self.manifest.config else f"tsdkd {STAGES[self.kind]}"


@dataclass(frozen=True, slots=True)
class Run:
    """A directory with artifacts, in the order of the stages."""

    name: str
    path: Path
    pieces: tuple[RunArtifact, ...]

    def of(self, kind: str) -> list[RunArtifact]:
        return [piece for piece in self.pieces if piece.kind == kind]

    def piece(self, name: str) -> RunArtifact | None:
        return next((piece for piece in self.pieces if piece.name == name), None)

    @property
    def trained(self) -> list[RunArtifact]:
        """Checkpoints that came from training; pruning makes some, too."""
        return [piece for piece in self.of("checkpoint") if "objective" in piece.manifest.config]


def find_runs(places: Sequence[Path]) -> list[Run]:
    """The runs at these places; one that only holds runs (rounds) stands for them. Raises InputError without any."""
    paths = [run for place in places for run in _runs_at(place)]
    if len({path.resolve() for path in paths}) < len(paths):
        raise InputError("A run is named twice.", "Name every run once.")
    return [Run(name, path, _pieces(path)) for name, path in zip(shorten_paths(paths), paths, strict=True)]


def _runs_at(place: Path) -> list[Path]:
    if _ours(place / MANIFEST_FILE):
        raise InputError(f"{place} is an artifact, not a run.", f"Name the run that holds it: {place.parent}.")
    if not place.is_dir():
        raise InputError(
            f"There is no run directory {place}.", "Name one that `tsdkd generate` or another stage wrote."
        )
    if _manifests(place, 1) or _manifests(place / "results", 1):
        return [place]
    below = [folder for folder in place.iterdir() if _shown(folder.name) and _manifests(folder, 1)]
    if not below:
        raise InputError(f"{place} holds no artifact.", "Name a run that `tsdkd generate` or another stage wrote.")
    return sorted(below, key=lambda path: (len(path.name), path.name))  # 2 before 10


def _manifests(place: Path, deepest: int) -> list[Path]:
    """Of the artifacts below; hidden folders and what others call a manifest are passed over."""
    found = [file for depth in range(1, deepest + 1) for file in place.glob(f"{'*/' * depth}{MANIFEST_FILE}")]
    return [file for file in found if all(map(_shown, file.parent.relative_to(place).parts)) and _ours(file)]


def _shown(name: str) -> bool:
    return not name.startswith(".")


def _ours(file: Path) -> bool:
    try:
        raw = json.loads(file.read_text())
    except OSError:
        return False
    except ValueError:
        return True  # reading it says what is wrong
    return isinstance(raw, dict) and {"format", "kind"} <= raw.keys()


def _pieces(run: Path) -> tuple[RunArtifact, ...]:
    found = [_piece(run, file.parent) for file in _manifests(run, DEEPEST)]
    kinds = list(STAGES)
    order = list(MODEL_ORDER)

    def place(piece: RunArtifact) -> tuple[Any, ...]:
        name = piece.path.name
        known = order.index(name) if name in order else len(order)
        return kinds.index(piece.kind), piece.name.count("/"), known, piece.name

    return tuple(sorted(found, key=place))


def _piece(run: Path, path: Path) -> RunArtifact:
    manifest = load_manifest(path)
    return RunArtifact(
        str(path.relative_to(run)), path, manifest, tuple(read_sessions(path)), is_locked(path), _size(path)
    )


def _size(path: Path) -> int:
    """Files that a stage removes meanwhile count nothing."""
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            with suppress(OSError):
                total += Path(folder, name).stat().st_size
    return total


def _without_teacher(entry: dict[str, float]) -> dict[str, float]:
    return {LEARNED_BY_HEART.get(name, name): value for name, value in entry.items() if name != "teacher_entropy"}
