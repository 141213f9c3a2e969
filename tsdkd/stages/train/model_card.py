"""The model card of a checkpoint: models, data, settings and metrics of its training."""

from collections.abc import Sequence
from typing import Any

from huggingface_hub import ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id

from tsdkd.artifacts.manifest import Manifest, flatten
from tsdkd.printable import escape_markdown
from tsdkd.stages.methods import Method
from tsdkd.stages.metrics.names import CARD_METRICS, HELD_OUT_METRICS, METRICS, metric, with_own_terms

MAX_ROWS = 12
"""Rows of the table of training steps; the steps are evenly spread."""


def model_card(
    manifest: Manifest, method: Method, steps: Sequence[dict[str, float]], evaluations: Sequence[dict[str, float]]
) -> str:
    """README.md of a checkpoint, from its manifest and its log's steps and held-out measurements."""
    student, *teachers = manifest.models
    names = " and ".join(escape_markdown(_last_part(teacher.name)) for teacher in teachers)
    origin = f"distilled from {names}" if teachers else "from given responses"
    adapter = manifest.config["lora"] and not manifest.config["lora"]["merge"]
    library = "peft" if adapter else "transformers"
    data = ModelCardData(
        base_model=_hub_id(student.name), library_name=library, tags=["distillation", manifest.config["method"]]
    )
    settings = {name: value for name, value in flatten(manifest.config).items() if value not in (None, [], ())}
    made_from = [
        *((model.role, model.name, model.weights) for model in manifest.models),
        *((parent.kind, parent.path, parent.fingerprint) for parent in manifest.parents),
    ]
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {escape_markdown(_last_part(student.name))}, {origin}",
        f"Distilled by {method.full_name}: {method.description}. Made with tsdkd; load with {library}.",
        "## Made from",
        _table(
            ["role", "name", "fingerprint"],
            [[escape_markdown(role), escape_markdown(name), digest[:16]] for role, name, digest in made_from],
        ),
        "## Settings",
        _table(["setting", "value"], [[name, escape_markdown(str(value))] for name, value in settings.items()]),
        "## Training",
        _step_table(steps),
    ]
    if evaluations:
        parts.append(_evaluation_table(evaluations))
    return "\n\n".join(parts) + "\n"


def _step_table(steps: Sequence[dict[str, float]]) -> str:
    names = with_own_terms(CARD_METRICS, steps[0])
    indices = sorted({round(i * (len(steps) - 1) / (MAX_ROWS - 1)) for i in range(MAX_ROWS)})
    rows = [[str(i + 1), *(f"{steps[i][name]:.4g}" for name in names)] for i in indices]
    return _table(["step", *(metric(name).label for name in names)], rows)


def _evaluation_table(evaluations: Sequence[dict[str, float]]) -> str:
    names = [name for name in HELD_OUT_METRICS if name in evaluations[0]]
    rows = [[str(entry["step"]), *(f"{entry[name]:.4f}" for name in names)] for entry in evaluations]
    return _table(["step", *(f"{METRICS[name].label} ({METRICS[name].unit})" for name in names)], rows)


def _table(head: list[str], rows: list[list[Any]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def _hub_id(name: str) -> str | None:
    """The name of a model if the hub accepts it in a card: it refuses cards that name a path."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def _last_part(name: str) -> str:
    return name.rstrip("/").rsplit("/", 1)[-1]
