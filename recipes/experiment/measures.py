"""The measures of a model: accuracy, divergence from the teacher, and health of training."""

import json
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

from tsdkd.artifacts.journal import read_sessions
from tsdkd.artifacts.reader import read_artifact
from tsdkd.stages.data.held_out import HeldOut, measure_held_out
from tsdkd.stages.data.offline import OfflineSource
from tsdkd.stages.metrics.log import METRICS_FILE, is_step
from tsdkd.stages.models.load import load_model

RESULT, ROWS = "result.json", "results.jsonl"
LAST_STEPS = 10
"""The number of last training steps over which health is averaged."""


def write_result(output: Path, measures: dict[str, object]) -> None:
    """Write `RESULT` into `output`; its presence marks a complete arm."""
    output.mkdir(parents=True, exist_ok=True)
    temporary = output / f"{RESULT}.tmp"
    temporary.write_text(json.dumps(measures))
    temporary.rename(output / RESULT)


def read_responses(rollouts: Path) -> list[tuple[str, str]]:
    """Prompts with their responses."""
    rows = read_artifact(rollouts, "rollouts").table().select(["messages", "response"]).to_pylist()
    return [(row["messages"][-1]["content"], row["response"]) for row in rows]


def response_measures(rollouts: Path, is_correct: Callable[[str, str], bool]) -> dict[str, float]:
    """Fractions of correct and of truncated responses, and tokens per response."""
    columns = ["messages", "response", "response_ids", "finish_reason"]
    rows = read_artifact(rollouts, "rollouts").table().select(columns).to_pylist()
    return {
        "accuracy": fmean(is_correct(row["messages"][-1]["content"], row["response"]) for row in rows),
        "length": fmean(len(row["response_ids"]) for row in rows),
        "truncated": fmean(row["finish_reason"] == "length" for row in rows),
    }


def divergence(model: Path, rollouts: Path, scores: Path) -> dict[str, float]:
    """KL from the teacher, top-1 agreement and the model's entropy on the teacher's responses, in nats per token."""
    samples = OfflineSource(rollouts, scores)
    reader = load_model(str(model))
    measured = measure_held_out(reader, reader.head, HeldOut(samples, range(len(samples))))
    return {name: measured[name] for name in ("kl", "top1_agreement", "entropy")}


def training_health(model: Path) -> dict[str, object]:
    """Health from the log of training, and whether training warned of degeneration; empty for an untrained model."""
    if not (model / METRICS_FILE).is_file():
        return {}
    log = [entry for line in (model / METRICS_FILE).read_text().splitlines() if is_step(entry := json.loads(line))]
    warnings = [warning for session in read_sessions(model) for warning in session.warnings]
    return {
        "repeating": fmean(step["repeating"] for step in log[-LAST_STEPS:]),
        "degenerated": any("degenerat" in warning for warning in warnings),
    }
