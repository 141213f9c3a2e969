"""The commands that make a run again: from the journals, else rebuilt from the manifests."""

import os
import shlex
from pathlib import Path
from typing import Any

from tsdkd.artifacts.manifest import Manifest
from tsdkd.stages.config.recorded import command_of, default_values, recorded_options
from tsdkd.stages.report.runs import Run, RunArtifact


def recorded_commands(run: Run) -> list[str]:
    """The last command of every artifact with a journal, oldest first."""
    last = [artifact.sessions[-1] for artifact in run.artifacts if artifact.sessions]
    return list(dict.fromkeys(session.command for session in sorted(last, key=lambda session: session.started)))


def rebuild_commands(run: Run) -> list[str]:
    """A command for every artifact without a journal."""
    return [rebuild_command(run, artifact) for artifact in run.artifacts if not artifact.sessions]


def rebuild_command(run: Run, artifact: RunArtifact) -> str:
    """The command that makes an artifact, with its inputs and the options that differ from their defaults."""
    command, manifest, path = command_of(artifact.manifest), artifact.manifest, artifact.path
    options = recorded_options(path, manifest, lambda name: Path(os.path.normpath(path / name)))
    default = default_values(command, manifest.config)
    words = _output(run, path, command)
    for name, value in options.items():
        same = name in default and _plain(value) == _plain(default[name])
        if name == "lambda" and manifest.config.get("online"):
            same = False  # it also makes the training online
        if not (same or (name in {"rollouts", "scores"} and _is_default_input(path, name, value, manifest))):
            words += _words(name, value)
    return shlex.join(["tsdkd", command, *map(str, words)])


def _output(run: Run, path: Path, command: str) -> list[object]:
    """Options that name the output: the run that holds it under its default name, else the directory itself."""
    if command == "prune":
        return ["--output", path]
    if command == "eval":
        return ["--results", path.parent]
    name = {"generate": "rollouts", "score": "scores", "train": "checkpoint"}[command]
    return ["--run", path.parent] if path.name == name else ["--run", run.path, f"--{name}", path]


def _is_default_input(path: Path, name: str, value: str, manifest: Manifest) -> bool:
    """Whether the run holds this input under its default name; online training reads only rollouts that are named."""
    online = manifest.config.get("online") is not None
    return not online and Path(value).resolve() == (path.parent / name).resolve()


def _words(name: str, value: Any) -> list[object]:
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    if name in {"model", "stop", "method-option"} or (name == "teacher" and isinstance(value, list)):
        return [word for entry in value for word in (f"--{name}", entry)]
    return [f"--{name}", ",".join(value) if isinstance(value, list | tuple) else value]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
