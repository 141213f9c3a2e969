"""The options that an artifact was made with, from its manifest: for config.yaml and for rebuilt commands."""

from collections.abc import Callable, Mapping
from dataclasses import fields
from math import inf
from pathlib import Path
from typing import Any

from tsdkd.artifacts.disk import replace_text
from tsdkd.artifacts.files import CONFIG_FILE
from tsdkd.artifacts.json_files import conform
from tsdkd.artifacts.manifest import HUB_DATASET, Manifest, flatten
from tsdkd.artifacts.replacing import artifact_name
from tsdkd.core.config import TSDKDConfig
from tsdkd.errors import ArtifactError
from tsdkd.printable import escape_controls
from tsdkd.stages.config.chat import PLAIN, TEMPLATE_PARENT
from tsdkd.stages.config.eval import EvalConfig
from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.config.option import config_options
from tsdkd.stages.config.prune import PruneConfig
from tsdkd.stages.config.score import ScoreConfig
from tsdkd.stages.config.train import ReplayConfig, TrainConfig
from tsdkd.stages.methods import METHODS
from tsdkd.stages.methods.origin import METHOD_FILE

CONFIGS: dict[str, type] = {
    "generate": GenerateConfig,
    "score": ScoreConfig,
    "train": TrainConfig,
    "prune": PruneConfig,
    "eval": EvalConfig,
}
"""The configuration of each command that writes an artifact."""
COMMAND_LINE_ONLY = {
    "overwrite": "replaces an artifact",
    "allow-code-execution": "runs programs that a model wrote",
}
"""Options that no file may give, and what they do."""
_COMMANDS = {"rollouts": "generate", "scores": "score", "checkpoint": "train", "results": "eval"}
ResolvePath = Callable[[str], Path]
"""Turns a parent's path, relative to the artifact, into the path that a command names."""


def command_of(manifest: Manifest) -> str:
    """The command that made an artifact, such as "train"."""
    return _command(manifest.kind, manifest.config)


def _command(kind: str, config: Mapping[str, Any]) -> str:
    return "prune" if "drop" in config else _COMMANDS[kind]


def check_config(kind: str, config: Mapping[str, Any]) -> None:
    """Raises ValueError for a recorded setting of a wrong type, or one that its option does not take.

    Settings that are missing or unknown pass: artifacts of an earlier or later tsdkd have them.
    """
    configuration = CONFIGS[_command(kind, config)]
    from_elsewhere = {"method"} if "method_origin" in config else set()  # reading runs no file of a method
    unread = {"method_options", *from_elsewhere}
    read = {name: value for name, value in config.items() if name not in unread}
    online = config.get("online")
    if from_elsewhere and isinstance(online, Mapping) and online.get("replay") is not None:
        conform(online["replay"], ReplayConfig, "config.online.replay")  # the method alone tells that it replays
        read["online"] = {**online, "replay": None}
    conform(read, configuration, "config")
    values = flatten(dict(config))
    if values.get("chat.template") not in {None, PLAIN}:  # a file is a parent
        raise ValueError(f"config.chat.template is {values['chat.template']!r}, not {PLAIN!r}")
    for option in config_options(configuration):
        value: Any = values.get(option.key)
        low, high = option.option.min, option.option.max
        is_number = type(value) in {int, float}
        if is_number and not (-inf if low is None else low) <= value <= (inf if high is None else high):
            raise ValueError(f"config.{option.key} is {value}, out of its range")


def recorded_objective(manifest: Manifest) -> TSDKDConfig:
    """The objective that trained a checkpoint. Raises ArtifactError for settings that this tsdkd does not know."""
    settings = manifest.config["objective"]  # empty for a method with its own losses
    if unknown := settings.keys() - {field.name for field in fields(TSDKDConfig)}:
        raise ArtifactError(f"The checkpoint has the unknown setting objective.{min(unknown)}.", "Update tsdkd.")
    objective: TSDKDConfig = conform(settings, TSDKDConfig)
    return objective


def recorded_options(path: Path, manifest: Manifest, resolve_path: ResolvePath) -> dict[str, Any]:
    """Inputs, models, seed and configuration of the artifact at `path`, by option name without dashes.

    Leaves out outputs and settings that the manifest does not record.
    """
    command = command_of(manifest)
    options = _inputs(path, manifest, resolve_path) | (
        {"seed": manifest.seed} if command in {"generate", "train", "eval"} else {}
    )
    options |= config_values(command, manifest.config)
    if "sha256" in manifest.config.get("method_origin", {}):
        options["method"] = str(resolve_path(METHOD_FILE))  # the checkpoint has a copy
    return options


def config_values(command: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a recorded configuration, by option name; settings without effect are left out."""
    values = flatten(dict(config))
    if command == "train":
        values |= {"lora": config["lora"] is not None} | _online_values(config)
        values = {key: value for key, value in values.items() if _has_effect(key, config)}
    options = [option for option in config_options(CONFIGS[command]) if values.get(option.key) not in (None, [], ())]
    return {option.name: values[option.key] for option in options}


def default_values(command: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The default values of a command's options, by name; the recorded method decides some of those of train."""
    values = {option.key: option.default for option in config_options(CONFIGS[command])}
    if command == "train" and (method := METHODS.get(config["method"])):
        values |= {f"objective.{name}": getattr(method.objective, name) for name in method.objective_options}
        values["online.sampling.teacher_fraction"] = method.teacher_fraction
    return {option.name: values[option.key] for option in config_options(CONFIGS[command])}


def config_text(path: Path, manifest: Manifest) -> str:
    """The content of config.yaml: `--config` reads it back to the same identity. Paths are absolute."""
    options = recorded_options(path, manifest, lambda name: (path / name).resolve())
    plain = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in options.items()
        if name not in COMMAND_LINE_ONLY
    }
    head = (
        f"# tsdkd {command_of(manifest)} --config FILE makes this artifact again; written by tsdkd {manifest.tsdkd}.\n"
    )
    text = options_text(plain, allow_unicode=True)
    if escape_controls(text) != text:
        text = options_text(plain)  # writes such characters in YAML's own way
    return head + text


def options_text(options: Mapping[str, Any], *, allow_unicode: bool = False) -> str:
    """Options as YAML. Words that `--config` would read as numbers, such as 0E0, are in quotes."""
    import yaml

    class Dumper(yaml.SafeDumper):
        pass

    def write_word(dumper: yaml.SafeDumper, word: str) -> yaml.ScalarNode:
        style = "'" if word.strip("+-.0123456789eE") == "" else None
        return dumper.represent_scalar("tag:yaml.org,2002:str", word, style)

    Dumper.add_representer(str, write_word)
    return yaml.dump(dict(options), Dumper=Dumper, sort_keys=False, allow_unicode=allow_unicode)


def write_config(path: Path, manifest: Manifest) -> None:
    """Write config.yaml beside the parts of an artifact."""
    replace_text(path / CONFIG_FILE, config_text(path, manifest))


def _inputs(path: Path, manifest: Manifest, resolve_path: ResolvePath) -> dict[str, Any]:
    """Models and parents."""
    if command_of(manifest) == "eval":
        return _eval_inputs(path, manifest, resolve_path)
    online = manifest.config.get("online") is not None
    options: dict[str, Any] = {model.role: model.name for model in manifest.models if model.role == "student"}
    teachers = {name: record.name for name, record in manifest.teachers.items()}
    if teachers and (online or command_of(manifest) != "train"):
        options["teacher"] = teachers.get("") or [f"{name}={model}" for name, model in teachers.items()]
    for parent in manifest.parents:
        if parent.kind == HUB_DATASET:
            options["prompts"] = parent.path
        else:
            options[parent.kind] = str(resolve_path(parent.path))
    return options


def _eval_inputs(path: Path, manifest: Manifest, resolve_path: ResolvePath) -> dict[str, Any]:
    options: dict[str, Any] = {"model": [f"{artifact_name(path)}={manifest.model('evaluated').name}"]}
    for parent in manifest.parents:
        if parent.kind == "scores":
            options["held-out"] = str(resolve_path(parent.path).parent)
        elif parent.kind == TEMPLATE_PARENT:
            options[parent.kind] = str(resolve_path(parent.path))
        elif parent.kind.endswith(" rows"):
            options["data"] = str(resolve_path(parent.path).parent)
    if any(task.startswith("mbpp") for task in manifest.config["tasks"]):
        options["allow-code-execution"] = True
    return options


def _online_values(config: Mapping[str, Any]) -> dict[str, Any]:
    if config["online"] is None:
        return {}
    sampling = config["online"]["sampling"]
    mixed = sampling["policy"] == "teacher-mixed"
    return {"online.sampling.teacher_fraction": sampling["teacher_fraction"] if mixed else 0.0}


def _has_effect(key: str, config: Mapping[str, Any]) -> bool:
    """Whether the recorded method has this option of the objective."""
    group, _, name = key.partition(".")
    if group != "objective":
        return True
    unused = "skew" if config["objective"]["divergence"] == "jsd" else "beta"
    method = METHODS.get(config["method"])  # one from elsewhere records no objective
    return method is not None and name in method.objective_options and name != unused
