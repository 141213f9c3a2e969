"""The commands that make a run again: as they were typed, else rebuilt from what the manifests say."""

import os
import shlex
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tsdkd.artifacts.manifest import HUB_DATASET, flatten
from tsdkd.stages.config.eval import EvalConfig
from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.config.prune import PruneConfig
from tsdkd.stages.config.score import ScoreConfig
from tsdkd.stages.config.train import LoRAConfig, OnlineConfig, ReplayConfig, TrainConfig
from tsdkd.stages.methods import find_method
from tsdkd.stages.report.runs import Run, RunArtifact

OPTIONS = {
    "student_fraction": "lambda",
    "online.sampling.temperature": "sample-temperature",
    "online.sampling.batch_size": "sample-batch-size",
    **{f"lora.{name}": f"lora-{name}" for name in ("rank", "alpha", "dropout", "targets")},
}
"""Settings whose options are called otherwise than the last part of their name."""
FOLLOWS = {"online.student_fraction"} | {
    f"online.sampling.{name}" for name in ("dtype", "part_size", "policy", "teacher_fraction")
}
"""Settings that are always given, or that others decide."""


def typed(run: Run) -> list[str]:
    """Of every artifact with a journal, the last command that worked on it; oldest first."""
    known = [piece.sessions[-1] for piece in run.artifacts if piece.sessions]
    return list(dict.fromkeys(session.command for session in sorted(known, key=lambda one: one.started)))


def rebuilt(run: Run) -> list[str]:
    """Of every artifact without a journal, a command with its inputs and all settings that are not the default."""
    return [rebuild(run, piece) for piece in run.artifacts if not piece.sessions]


def rebuild(run: Run, piece: RunArtifact) -> str:
    words = _BUILT[piece.stage](run, piece)
    return shlex.join(["tsdkd", piece.stage.split()[1], *map(str, words)])


def _generate(run: Run, piece: RunArtifact) -> list[object]:
    told = _options(piece.manifest.config, asdict(GenerateConfig()))
    seed = ["--seed", piece.manifest.seed]
    return [*_place(run, piece, "rollouts"), *_models(piece), *_prompts(piece), *seed, *told]


def _score(run: Run, piece: RunArtifact) -> list[object]:
    read = _input(run, piece, "rollouts")
    return [
        *_place(run, piece, "scores"),
        *read,
        *_models(piece),
        *_options(piece.manifest.config, asdict(ScoreConfig())),
    ]


def _train(run: Run, piece: RunArtifact) -> list[object]:
    config, default = piece.manifest.config, asdict(TrainConfig())
    default["objective"] = asdict(find_method(config["method"]).objective)
    words: list[object] = _place(run, piece, "checkpoint")
    if config["online"] is None:
        words += [*_input(run, piece, "rollouts"), *_input(run, piece, "scores"), *_models(piece)[:2]]
    else:
        default["online"] = asdict(OnlineConfig()) | {
            "replay": asdict(ReplayConfig()) if config["online"]["replay"] else None
        }
        read = _input(run, piece, "rollouts", always=True) or _prompts(piece)
        words += [*_models(piece), *read]
        words += [] if config["online"]["replay"] else ["--lambda", config["online"]["student_fraction"]]
        sampling = config["online"]["sampling"]
        share = sampling["teacher_fraction"] if sampling["policy"] == "teacher-mixed" else 0.0
        words += [] if share == find_method(config["method"]).teacher_fraction else ["--teacher-fraction", share]
    if config["lora"] is not None:
        default["lora"] = asdict(LoRAConfig())
        words.append("--lora")
    return [*words, "--seed", piece.manifest.seed, *_options(config, default)]


def _prune(run: Run, piece: RunArtifact) -> list[object]:
    told = _options(piece.manifest.config, asdict(PruneConfig()))
    return ["--output", piece.path, *_models(piece), *_prompts(piece), *told]


def _eval(run: Run, piece: RunArtifact) -> list[object]:
    words: list[object] = ["--results", piece.path.parent]
    words += ["--model", f"{piece.path.name}={piece.manifest.model('evaluated').name}"]
    for parent in piece.manifest.parents:
        place = _near(piece.path / parent.path)
        words += ["--held_out", place.parent] if parent.kind == "scores" else []
        words += ["--data", place.parent] if parent.kind.endswith(" rows") and "--data" not in words else []
    words += ["--allow-code-execution"] if "mbpp" in " ".join(piece.manifest.config["tasks"]) else []
    return [*words, *_options(piece.manifest.config, asdict(EvalConfig()))]


_BUILT = {
    "tsdkd generate": _generate,
    "tsdkd score": _score,
    "tsdkd train": _train,
    "tsdkd prune": _prune,
    "tsdkd eval": _eval,
}


def _options(config: Mapping[str, Any], default: Mapping[str, Any]) -> list[object]:
    """Those that differ from the default."""
    told, usual = flatten(dict(config)), flatten(dict(default))
    words: list[object] = []
    for name, value in told.items():
        same = value == usual.get(name) or (isinstance(value, list) and tuple(value) == usual.get(name))
        if not (same or name in FOLLOWS):
            words += _option(OPTIONS.get(name, name.split(".")[-1].replace("_", "-")), value)
    return words


def _option(name: str, value: Any) -> list[object]:
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [f"--{name}", ",".join(value) if isinstance(value, list) else value]


def _place(run: Run, piece: RunArtifact, usual: str) -> list[object]:
    """Where it is written: the run, or the folder in it, that has it at its usual place."""
    if piece.path.name == usual:
        return ["--run", piece.path.parent]
    return ["--run", run.path, f"--{usual}", piece.path]


def _input(run: Run, piece: RunArtifact, kind: str, *, always: bool = False) -> list[object]:
    """A parent that is not where the run has it."""
    parent = next((parent for parent in piece.manifest.parents if parent.kind == kind), None)
    if parent is None:
        return []
    place = _near(piece.path / parent.path)
    usual = place.resolve() == (piece.path.parent / kind).resolve()
    return [] if usual and not always else [f"--{kind}", place]


def _models(piece: RunArtifact) -> list[object]:
    return [word for model in piece.manifest.models for word in (f"--{model.role}", model.name)]


def _prompts(piece: RunArtifact) -> list[object]:
    for parent in piece.manifest.parents:
        if parent.kind in {"prompts", HUB_DATASET}:
            return ["--prompts", parent.path if parent.kind == HUB_DATASET else _near(piece.path / parent.path)]
    return []


def _near(path: Path) -> Path:
    """Without the steps up and down again."""
    return Path(os.path.normpath(path))
