"""A run's configuration in sentences, and what two runs were told differently."""

import json
from collections.abc import Container, Iterable
from dataclasses import asdict
from typing import Any

from tsdkd.artifacts.manifest import HUB_DATASET, MADE_BY, Manifest, flatten
from tsdkd.stages.config.train import TrainConfig
from tsdkd.stages.report.runs import Run, RunArtifact

PAPERS = ("method", "objective", "learning_rate", "epochs", "batch_size", "warmup_ratio", "schedule", "weight_decay")
"""Of training's settings, those the paper gives; they are the defaults."""
SIGNALS = {
    "hidden": "the teacher's hidden states, which hold its distribution exactly",
    "hidden8": "the teacher's hidden states, rounded to 8 bits",
    "topk": "the teacher's {top_k} most likely tokens",
    "ranks": "no more than its ranks",
}


def sentences(run: Run) -> list[tuple[str, str]]:
    """What each artifact was told, by its place in the run."""
    return [(piece.name, _SAID[piece.kind](piece)) for piece in run.pieces]


def departures(run: Run) -> list[tuple[str, str, str]]:
    """Settings of training that are not the paper's: name, value, the paper's."""
    paper = flatten({name: json.loads(json.dumps(asdict(TrainConfig())))[name] for name in PAPERS})
    found = []
    for piece in run.trained:
        prefix = f"{piece.name}: " if len(run.trained) > 1 else ""
        told = flatten(piece.manifest.config)
        found += [(f"{prefix}{key}", told[key], paper[key]) for key in paper if told.get(key) != paper[key]]
    return [(name, _value(mine), _value(theirs)) for name, mine, theirs in found]


def settings(run: Run) -> list[tuple[str, str]]:
    """Everything that was told, in full."""
    return [(name, _value(value)) for name, value in _told(run, {piece.name for piece in run.pieces}).items()]


def differences(runs: list[Run]) -> list[list[str]]:
    """Rows of what the runs were told differently: name, then each run's value; first what not all of them have."""
    made = [[piece.name for piece in run.pieces] for run in runs]
    everywhere = set(made[0]).intersection(*made[1:])
    lacked = dict.fromkeys(name for names in made for name in names if name not in everywhere)
    rows = [[name, *("made" if name in names else "-" for names in made)] for name in lacked]
    told = [_told(run, everywhere) for run in runs]
    names = dict.fromkeys(name for one in told for name in one)
    compared = [[name, *(_value(one[name]) if name in one else "-" for one in told)] for name in names]
    return rows + [row for row in compared if len(set(row[1:])) > 1]


def _told(run: Run, names: Container[str]) -> dict[str, Any]:
    """Of some of its artifacts."""
    found: dict[str, Any] = {}
    for piece in (piece for piece in run.pieces if piece.name in names):
        manifest = piece.manifest
        mine = {"seed": manifest.seed, "engine": manifest.engine, "tsdkd": manifest.tsdkd}
        mine |= {f"{model.role}": f"{last(model.name)} ({model.weights[:8]})" for model in manifest.models}
        mine |= {p.kind: f"{last(p.path)} ({p.fingerprint[:8]})" for p in manifest.parents if p.kind not in MADE_BY}
        found |= {f"{piece.name}: {name}": value for name, value in (mine | flatten(manifest.config)).items()}
        found |= {f"{piece.name}: {name}": version for name, version in manifest.libraries.items()}
    return found


def last(name: str) -> str:
    """The end of a path or of a hub's name."""
    return name.rstrip("/").rsplit("/", 1)[-1]


def _rollouts(piece: RunArtifact) -> str:
    config, found = piece.manifest.config, piece.manifest.summary
    names = {model.role: f"the {model.role} {last(model.name)}" for model in piece.manifest.models}
    who = " and ".join(names.values())
    how = {"mixed": f", each its share ({config['student_fraction']:g} the student's),"}
    how["speculative"] = f", token by token (the student's stay among the teacher's best {config['accept_k']}),"
    if config["policy"] == "teacher-mixed":
        how["teacher-mixed"] = (
            f", token by token (the teacher's share of the distribution {config['teacher_fraction']:g}),"
        )
    prompts = _source(piece.manifest)
    times = f", {config['samples_per_prompt']} times each," if config["samples_per_prompt"] > 1 else ""
    warm = f"at temperature {config['temperature']:g}" if config["temperature"] else "greedily"
    nucleus = f", top-p {config['top_p']:g}" if config["top_p"] < 1 else ""
    count = f"{found['prompts']:,} prompts" if found else "prompts"
    told = (
        f"{_capital(who)}{how.get(config['policy'], '')} answered {count}{prompts}{times} {warm}{nucleus}, "
        f"with at most {config['max_new_tokens']:,} tokens, by {piece.manifest.engine}, seed {piece.manifest.seed}."
    )
    if found:
        told += f" {found['responses']:,} responses, {found['truncated']:,} of them cut off."
    return told


def _scores(piece: RunArtifact) -> str:
    config = piece.manifest.config
    teacher, student = (last(piece.manifest.model(role).name) for role in ("teacher", "student"))
    kept = SIGNALS[config["signal"]].format(**config)
    return (
        f"The teacher {teacher} and the student {student} read every response. Kept: the student's {config['k']} "
        f"candidates at each token, how the teacher ranks them, both entropies, and {kept}."
    )


def _checkpoint(piece: RunArtifact) -> str:
    manifest = piece.manifest
    if "objective" not in manifest.config:
        return _pruned(manifest)
    config = manifest.config
    teacher, student = (last(manifest.model(role).name) for role in ("teacher", "student"))
    steps = f"{manifest.summary['steps']:,} steps" if manifest.summary else "Steps"
    epochs = f"{config['epochs']:g} epoch" + "s" * (config["epochs"] != 1)
    lora = config["lora"]
    weights = "Every weight learned" if lora is None else f"Adapters of rank {lora['rank']} learned"
    return (
        f"The student {student} learned from the teacher {teacher}, {_responses(manifest)}. {steps} of "
        f"{config['batch_size']:,} responses, {epochs}, seed {manifest.seed}. {weights} at "
        f"{config['learning_rate']:g} ({config['schedule']}, the first {_percent(config['warmup_ratio'])} rising), the "
        f"forward in {config['precision']}. {_objective(config['method'], config['objective'])}"
    )


def _responses(manifest: Manifest) -> str:
    online = manifest.config["online"]
    if online is None:
        scored = any(parent.kind == "scores" for parent in manifest.parents)
        return "from recorded scores" if scored else "from its recorded answers alone"
    if online["replay"]:
        return "which read along: a schedule decided when the student answered afresh, and when it was replayed"
    sampling = online["sampling"]
    mixed = sampling["policy"] == "teacher-mixed"
    share = f", {_percent(sampling['teacher_fraction'])} of each token's distribution the teacher's" if mixed else ""
    return (
        f"which read along: {_percent(online['student_fraction'])} of the prompts were answered afresh as the student changed"
        f"{share}"
    )


def _objective(method: str, objective: dict[str, Any]) -> str:
    long = "an adaptive opener" if objective["opener"] == "adaptive" else f"openers of {_percent(objective['opener'])}"
    gate = "where the student is less sure than the teacher" if objective["gate"] else "everywhere alike"
    jsd = f"JSD with β = {objective['beta']:g}"
    divergences = {"jsd": {0: f"forward KL ({jsd})", 1: f"reverse KL ({jsd})"}.get(objective["beta"], jsd)}
    skewed = objective["divergence"].replace("-", " ").replace("kl", "KL") + f" of {objective['skew']:g}"
    terms = {
        f"ranking of {objective['k']} candidates in {long} of the entropy": objective["alpha"],
        f"{divergences.get(objective['divergence'], skewed)} {gate}": objective["direct_weight"],
        f"entropy of the {_percent(objective['em_ratio'])} most uncertain tokens": objective["em_weight"],
        "long-range term on sampled tokens": objective.get("policy_gradient_weight"),
    }
    said = [f"{weight:g} times the {term}" for term, weight in terms.items() if weight]
    released = f" The {', '.join(objective['released'])} as in the released code." if objective["released"] else ""
    return f"Objective {method}: {'; '.join(said)}.{released}"


def _pruned(manifest: Manifest) -> str:
    layers = ", ".join(map(str, manifest.summary.get("dropped_layers", ())))
    return f"{last(manifest.model('teacher').name)} without its layers {layers or '(not chosen yet)'}."


def _results(piece: RunArtifact) -> str:
    config, found = piece.manifest.config, piece.manifest.summary
    asked = [
        f"{name} ({one['documents']:,} documents, {one['shots']} shots)"
        for name, one in found.items()
        if name != "held_out"
    ]
    model, tasks = last(piece.manifest.model("evaluated").name), ", ".join(asked or config["tasks"])
    near = f", and on {found['held_out']['responses']:,} held-out responses" if "held_out" in found else ""
    return f"Measured: {model}, on {tasks}{near}."


_SAID = {"rollouts": _rollouts, "scores": _scores, "checkpoint": _checkpoint, "results": _results}


def _source(manifest: Manifest) -> str:
    names = [parent.path for parent in manifest.parents if parent.kind in {"prompts", HUB_DATASET}]
    return f" of {last(names[0])}" if names else ""


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _percent(share: float) -> str:
    return f"{100 * share:g}%"


def _value(value: Any) -> str:
    if isinstance(value, Iterable) and not isinstance(value, str | dict):
        return ", ".join(map(str, value))
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
