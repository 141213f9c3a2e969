"""The model card of a checkpoint: what was done to the model, with what, and how it went."""

from collections.abc import Sequence
from typing import Any

from huggingface_hub import ModelCardData

from tsdkd.artifacts.manifest import Manifest, flatten
from tsdkd.stages.methods import find_method

CURVES = ("loss", "indirect", "direct", "entropy", "policy_gradient", "student_entropy", "top1_agreement", "grad_norm")
ROWS = 12
"""Steps in the table of curves, evenly spread."""


def model_card(manifest: Manifest, steps: Sequence[dict[str, float]], evaluated: Sequence[dict[str, float]]) -> str:
    """README.md of a checkpoint."""
    student, teacher = (manifest.model(role) for role in ("student", "teacher"))
    adapter = manifest.config["lora"] and not manifest.config["lora"]["merge"]
    data = ModelCardData(
        base_model=student.name,
        library_name="peft" if adapter else "transformers",
        tags=["distillation", manifest.config["method"]],
    )
    settings = {name: value for name, value in flatten(manifest.config).items() if value not in (None, [], ())}
    objective = find_method(manifest.config["method"])
    what = (
        f"Distilled by {objective.title}: {objective.means}. "
        f"Made with tsdkd; load with {'peft' if adapter else 'transformers'}."
    )
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {_last(student.name)}, distilled from {_last(teacher.name)}",
        what,
        "## Made from",
        _table(
            ["what", "name", "fingerprint"],
            [
                *[[model.role, model.name, model.weights[:16]] for model in manifest.models],
                *[[parent.kind, parent.path, parent.fingerprint[:16]] for parent in manifest.parents],
            ],
        ),
        "## Settings",
        _table(["setting", "value"], [[name, str(value)] for name, value in settings.items()]),
        "## Training",
        _curves(steps),
    ]
    if evaluated:
        parts += ["On held-out prompts (nats per token):", _evaluations(evaluated)]
    return "\n\n".join(parts) + "\n"


def _curves(steps: Sequence[dict[str, float]]) -> str:
    names = [name for name in CURVES if name in steps[0]]
    chosen = sorted({round(i * (len(steps) - 1) / (ROWS - 1)) for i in range(ROWS)})
    rows = [[str(i + 1), *(f"{steps[i][name]:.4g}" for name in names)] for i in chosen]
    return _table(["step", *names], rows)


def _evaluations(evaluated: Sequence[dict[str, float]]) -> str:
    rows = [[str(e["step"]), *(f"{e[f'eval_{name}']:.4f}" for name in ("kl", "agreement"))] for e in evaluated]
    return _table(["step", "KL to the teacher", "top-1 agreement"], rows)


def _table(head: list[str], rows: list[list[Any]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def _last(name: str) -> str:
    return name.rstrip("/").rsplit("/", 1)[-1]
