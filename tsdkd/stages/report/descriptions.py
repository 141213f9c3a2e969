"""Describes each artifact of a run in a sentence, and compares settings with the paper and between runs."""

import json
from collections.abc import Container, Iterable
from dataclasses import asdict
from typing import Any

from tsdkd.artifacts.manifest import HUB_DATASET, MADE_BY, Manifest, ModelRecord, flatten
from tsdkd.core.config import TERMS
from tsdkd.stages.config.generate import GIVEN
from tsdkd.stages.config.train import TrainConfig
from tsdkd.stages.metrics.names import METRICS
from tsdkd.stages.report.runs import Run, RunArtifact

PAPER_SETTINGS = (
    *("method", "objective", "learning_rate", "epochs", "batch_size", "warmup_ratio", "schedule", "weight_decay"),
)
"""Training settings that the paper's Table 10 gives; `TrainConfig` has them as defaults."""
SIGNALS = {
    "hidden": "the teacher's hidden states (its exact distribution)",
    "hidden8": "the teacher's hidden states in 8 bits",
    "topk": "the teacher's {top_k} most likely tokens",
    "ranks": "no further teacher signal",
}


def describe_artifacts(run: Run) -> list[tuple[str, str]]:
    """Name and description of each artifact."""
    return [(artifact.name, _DESCRIPTIONS[artifact.kind](artifact)) for artifact in run.artifacts]


def differences_to_paper(run: Run) -> list[tuple[str, str, str]]:
    """Training settings that differ from the paper's: name, value, the paper's value."""
    paper = flatten({name: json.loads(json.dumps(asdict(TrainConfig())))[name] for name in PAPER_SETTINGS})
    rows = []
    for artifact in run.trained:
        prefix = f"{artifact.name}: " if len(run.trained) > 1 else ""
        settings = flatten(artifact.manifest.config)
        rows += [
            (f"{prefix}{name}", _format_value(settings[name]), _format_value(value))
            for name, value in paper.items()
            if name in settings and settings[name] != value
        ]
    return rows


def all_settings(run: Run) -> list[tuple[str, str]]:
    """Name and value of every setting of every artifact."""
    settings = _settings(run, {artifact.name for artifact in run.artifacts})
    return [(name, _format_value(value)) for name, value in settings.items()]


def differences_between(runs: list[Run]) -> list[list[str]]:
    """Rows of a name and each run's value: first artifacts that not every run has, then settings that differ."""
    artifact_names = [[artifact.name for artifact in run.artifacts] for run in runs]
    shared = set(artifact_names[0]).intersection(*artifact_names[1:])
    unshared = dict.fromkeys(name for names in artifact_names for name in names if name not in shared)
    rows = [[name, *("yes" if name in names else "-" for names in artifact_names)] for name in unshared]
    settings = [_settings(run, shared) for run in runs]
    for name in dict.fromkeys(name for values in settings for name in values):
        row = [name, *(_format_value(values[name]) if name in values else "-" for values in settings)]
        rows += [row] if len(set(row[1:])) > 1 else []
    return rows


def _settings(run: Run, artifact_names: Container[str]) -> dict[str, Any]:
    """The settings, inputs and versions of some of the run's artifacts, by "artifact: setting"."""
    settings: dict[str, Any] = {}
    for artifact in (artifact for artifact in run.artifacts if artifact.name in artifact_names):
        manifest = artifact.manifest
        values = {"seed": manifest.seed, "engine": manifest.engine, "tsdkd": manifest.tsdkd}
        values |= {model.role: f"{base_name(model.name)} ({model.weights[:8]})" for model in manifest.models}
        for parent in manifest.parents:
            if parent.kind not in MADE_BY:
                values[parent.kind] = f"{base_name(parent.path)} ({parent.fingerprint[:8]})"
        values |= flatten(manifest.config) | manifest.libraries
        settings |= {f"{artifact.name}: {name}": value for name, value in values.items()}
    return settings


def base_name(name: str) -> str:
    """The last component of a path or hub id."""
    return name.rstrip("/").rsplit("/", 1)[-1]


def _describe_rollouts(artifact: RunArtifact) -> str:
    manifest = artifact.manifest
    config, summary = manifest.config, manifest.summary
    sources = [parent.path for parent in manifest.parents if parent.kind in {"prompts", HUB_DATASET}]
    prompts = f"{summary['prompts']:,} prompts" if summary else "prompts"
    prompts += f" of {base_name(sources[0])}" if sources else ""
    if config["policy"] == GIVEN:
        return _describe_given(prompts, summary)
    authors = " and ".join(
        _role_and_name(model) for model in manifest.models if config["policy"] != "student" or model.role == "student"
    )
    policies = {
        "mixed": f" ({_percent(config['student_fraction'])} of the prompts to the student)",
        "speculative": f", token by token (student tokens accepted in the teacher's top {config['accept_k']}),",
        "teacher-mixed": f", token by token (teacher fraction {config['teacher_fraction']:g}),",
    }
    samples = config["samples_per_prompt"]
    settings = [
        *([f"{samples} responses per prompt"] if samples > 1 else []),
        f"temperature {config['temperature']:g}" if config["temperature"] else "greedy",
        *([f"top-p {config['top_p']:g}"] if config["top_p"] < 1 else []),
        f"at most {config['max_new_tokens']:,} tokens",
        *([f"cut after {limit:,} tokens"] if (limit := config.get("rollout_tokens")) else []),
        *([f"ended by {' or '.join(map(repr, stop))}"] if (stop := config.get("stop")) else []),
        f"engine {manifest.engine}",
        f"seed {manifest.seed}",
    ]
    text = f"{_capitalize(authors)}{policies.get(config['policy'], '')} responded to {prompts}: {', '.join(settings)}."
    return f"{text} {summary['responses']:,} responses, {summary['truncated']:,} truncated." if summary else text


def _teachers(manifest: Manifest) -> str:
    return " and ".join(map(_role_and_name, manifest.teachers.values()))


def _role_and_name(model: ModelRecord) -> str:
    """Such as "the student small", or "the teacher large (math)" of several."""
    if model.teacher_name:
        return f"the teacher {base_name(model.name)} ({model.teacher_name})"
    return f"the {model.role} {base_name(model.name)}"


def _capitalize(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def _describe_given(prompts: str, summary: dict[str, Any]) -> str:
    if not summary:
        return f"The responses to {prompts} were given."
    return (
        f"The responses to {prompts} were given: {summary['responses']:,} responses with {summary['turns']:,} turns, "
        f"{summary['response_tokens']:,} tokens that are learned and {summary['context_tokens']:,} of context between "
        f"turns; {summary['truncated']:,} responses without an end token."
    )


def _describe_scores(artifact: RunArtifact) -> str:
    config = artifact.manifest.config
    student = base_name(artifact.manifest.model("student").name)
    signal = SIGNALS[config["signal"]].format(**config)
    own = ", each teacher its own" if len(artifact.manifest.teachers) > 1 else ""
    return (
        f"{_capitalize(_teachers(artifact.manifest))} and the student {student} scored every response{own}. "
        f"Recorded for each token: both entropies, the student's {config['k']} candidates, the teacher's rank of each, "
        f"and {signal}."
    )


def _describe_checkpoint(artifact: RunArtifact) -> str:
    manifest = artifact.manifest
    config = manifest.config
    if "objective" not in config:
        layers = ", ".join(map(str, manifest.summary.get("dropped_layers", ())))
        return f"{base_name(manifest.model('teacher').name)} without its layers {layers or '(not chosen yet)'}."
    student = base_name(manifest.model("student").name)
    teacher = f"from {_teachers(manifest)}" if manifest.teachers else "from given responses"
    steps = f"{manifest.summary['steps']:,} steps" if manifest.summary else "Steps"
    epochs = f"{config['epochs']:g} epoch" + "s" * (config["epochs"] != 1)
    weights = "all weights" if config["lora"] is None else f"LoRA adapters of rank {config['lora']['rank']}"
    return (
        f"The student {student} learned {teacher}, {_describe_data(manifest)}. "
        f"{steps} of {config['batch_size']:,} responses, {epochs}, seed {manifest.seed}. "
        f"Trained: {weights}, learning rate {config['learning_rate']:g}, {config['schedule']} schedule, "
        f"{_percent(config['warmup_ratio'])} warmup, forward pass in {config['precision']}. "
        f"{_describe_objective(config['method'], config['objective'], config.get('method_options', ()))}"
    )


def _describe_data(manifest: Manifest) -> str:
    online = manifest.config["online"]
    if online is None:
        has_scores = any(parent.kind == "scores" for parent in manifest.parents)
        return "offline, from recorded scores" if has_scores else "offline, from its recorded responses alone"
    if online["replay"]:
        return "online; a schedule decided when the student responded and when its responses were replayed"
    sampling = online["sampling"]
    mixed = sampling["policy"] == "teacher-mixed"
    teacher = f" (teacher fraction {sampling['teacher_fraction']:g} of each token's distribution)" if mixed else ""
    return f"online; the student responded to {_percent(online['student_fraction'])} of the prompts{teacher}"


def _describe_objective(method: str, objective: dict[str, Any], options: Iterable[str]) -> str:
    if not objective:  # the method's own losses
        return f"Method {method}{': ' if options else ''}{', '.join(options)}."
    fraction = objective["opener"]
    opener = "an adaptive opener" if fraction == "adaptive" else f"openers with {_percent(fraction)} of the entropy"
    gate = "weighted by the gate" if objective["gate"] else "without a gate"
    details = {
        "indirect": f" (ranking of {objective['k']} candidates in {opener})",
        "direct": f" ({_describe_divergence(objective)}, {gate})",
        "entropy": f" (of the {_percent(objective['em_ratio'])} most uncertain tokens)",
    }
    weighted = " + ".join(
        f"{objective[weight]:g} \u00d7 {METRICS[term].label}{details.get(term, '')}"
        for term, weight in TERMS.items()
        if objective[weight]
    )
    released = f" As in the released code: {', '.join(objective['released'])}." if objective["released"] else ""
    return f"Method {method}: {weighted}.{released}"


def _describe_divergence(objective: dict[str, Any]) -> str:
    if objective["divergence"] != "jsd":
        name = objective["divergence"].replace("-", " ").replace("kl", "KL")
        return f"{name} of {objective['skew']:g}"
    jsd = f"JSD with β = {objective['beta']:g}"
    return {0: f"forward KL, {jsd}", 1: f"reverse KL, {jsd}"}.get(objective["beta"], jsd)


def _describe_results(artifact: RunArtifact) -> str:
    config, summary = artifact.manifest.config, artifact.manifest.summary
    benchmarks = [
        f"{name} ({result['documents']:,} documents, {result['shots']} shots)"
        for name, result in summary.items()
        if name != "held_out"
    ]
    model, tasks = base_name(artifact.manifest.model("evaluated").name), ", ".join(benchmarks or config["tasks"])
    held_out = f" and on {summary['held_out']['responses']:,} held-out responses" if "held_out" in summary else ""
    return f"The model {model} was measured on {tasks}{held_out}."


_DESCRIPTIONS = {
    "rollouts": _describe_rollouts,
    "scores": _describe_scores,
    "checkpoint": _describe_checkpoint,
    "results": _describe_results,
}


def _percent(fraction: float) -> str:
    return f"{100 * fraction:g}%"


def _format_value(value: Any) -> str:
    if isinstance(value, Iterable) and not isinstance(value, str | dict):
        return ", ".join(map(str, value))
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
