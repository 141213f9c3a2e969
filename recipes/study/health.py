"""Outside mass and gradient shares, a row per arm: python -m recipes.study.health DIRECTORY/TASK

The held-out columns measure each model on every token of the teacher's held-out responses, so that they include arms
without an indirect term. The other columns come from the logs: the opener of the student's own responses.
"""

import sys
from pathlib import Path
from statistics import fmean

import torch

from recipes.experiment.arms import seed_directories
from recipes.experiment.measures import LAST_STEPS
from recipes.experiment.settings import Settings
from recipes.experiment.tasks import find_task
from tsdkd.core import TSDKDConfig, token_selective_loss
from tsdkd.core.config import TERMS
from tsdkd.stages.data.offline import OfflineSource
from tsdkd.stages.data.source import collate
from tsdkd.stages.metrics.log import METRICS_FILE, is_step, read_log
from tsdkd.stages.models.language_model import hidden_states
from tsdkd.stages.models.load import load_model

MASSES = ("student_outside_mass", "teacher_outside_mass")
SHARES = tuple(f"{term}_grad_share" for term in TERMS)
COLUMNS = [
    *("", "seeds", "held-out: student outside mass", "teacher outside mass"),
    *("first steps: student", "last steps: student", "first steps: teacher", "last steps: teacher"),
    "share of indirect, direct, entropy",
]


@torch.no_grad()
def held_out_masses(model: Path, samples: OfflineSource, k: int) -> dict[str, float]:
    """Both models' probability outside the model's k candidates, means over the tokens of held-out responses."""
    student, batch = load_model(str(model)), collate([samples[i] for i in range(len(samples))], samples)
    hidden = hidden_states(student.model, batch["input_ids"], batch["attention_mask"])
    logits = student.head.logits(hidden[batch["predicting"]])
    every_token = TSDKDConfig(k=k, opener=1.0)
    _, metrics = token_selective_loss(logits, samples.signal(batch), batch["response_mask"], every_token)
    return {name: float(metrics[name]) for name in MASSES}


def read_log_means(checkpoint: Path) -> dict[str, float]:
    """Means over the first and the last steps, and of the shares over all steps."""
    log = [entry for entry in read_log(checkpoint / METRICS_FILE) if is_step(entry)]
    parts = {"first": log[:LAST_STEPS], "last": log[-LAST_STEPS:]}
    values = {
        f"{part} {name}": fmean(step[name] for step in steps)
        for part, steps in parts.items()
        for name in MASSES
        if name in steps[0]
    }
    return values | {name: fmean(step.get(name, 0.0) for step in log) for name in SHARES if name in log[0]}


def row(name: str, measured: list[dict[str, float]]) -> list[str]:
    """The cells of `COLUMNS`, means over seeds."""

    def mean(key: str, format_: str = ".4f") -> str:
        return format(fmean(values[key] for values in measured), format_) if key in measured[0] else ""

    steps = [mean(f"{part} {name}") for name in MASSES for part in ("first", "last")]
    shares = ", ".join(mean(share, ".2f") or "0" for share in SHARES[:3]) if SHARES[1] in measured[0] else ""
    return [name, str(len(measured)), *map(mean, MASSES), *steps, shares]


def measure_arms(directory: Path) -> list[list[str]]:
    """A row for each arm of a task: the students before training, and the trained ones."""
    seeds = seed_directories(directory)
    k = find_task(Settings(directory.name)).conditions.k or TSDKDConfig().k
    models = {model.name: "" for seed in seeds for model in sorted(seed.glob("student*/")) if not model.suffix}
    models |= {model.parent.name: "checkpoint" for seed in seeds for model in sorted(seed.glob("*/checkpoint/"))}
    rows = []
    for name, inside in models.items():
        measured = []
        for seed in seeds:
            model = seed / name / inside
            if (model / "config.json").is_file():
                samples = OfflineSource(directory / "teacher-test-held-out", seed / "test-held-out")
                log = read_log_means(model) if (model / METRICS_FILE).is_file() else {}
                measured.append(held_out_masses(model, samples, k) | log)
        rows += [row(name, measured)] if measured else []
    return rows


def main() -> None:
    table = [COLUMNS, ["---"] * len(COLUMNS), *measure_arms(Path(sys.argv[1]))]
    sys.stdout.write("".join(f"| {' | '.join(cells)} |\n" for cells in table))


if __name__ == "__main__":
    main()
