"""What is measured of a model: accuracy on the test, closeness to the teacher, and how it answers."""

import json
from pathlib import Path
from statistics import fmean

from recipes.study import task
from tsdkd.artifacts.journal import read_sessions
from tsdkd.artifacts.reader import read_artifact
from tsdkd.stages.data.held_out import HeldOut, measure_held_out
from tsdkd.stages.data.offline import OfflineSource
from tsdkd.stages.models.load import load_model

RESULT = "result.json"
LOG = "metrics.jsonl"
END = 10
"""Steps at the end of training that health is a mean over."""


def write(output: Path, model: Path, rollouts: Path, scores: Path) -> None:
    """The measures of a model whose answers are in `output`, as one file there, written last.

    `rollouts` and `scores` are held-out responses of the teacher.
    """
    found = of_answers(output / "answers") | _closeness(model, OfflineSource(rollouts, scores)) | of_training(model)
    aside = output / f"{RESULT}.tmp"
    aside.write_text(json.dumps(found))
    aside.rename(output / RESULT)


def of_answers(rollouts: Path) -> dict[str, float]:
    """Shares of the problems that were answered rightly and that were cut off, and tokens of an answer."""
    columns = ["messages", "response", "response_ids", "finish_reason"]
    rows = read_artifact(rollouts, "rollouts").table().select(columns).to_pylist()
    return {
        "accuracy": fmean(task.is_right(row["messages"][-1]["content"], row["response"]) for row in rows),
        "length": fmean(len(row["response_ids"]) for row in rows),
        "truncated": fmean(row["finish_reason"] == "length" for row in rows),
    }


def _closeness(model: Path, samples: OfflineSource) -> dict[str, float]:
    """KL from the teacher on its held-out answers and the model's entropy there, nats a token."""
    reader = load_model(str(model))
    found = measure_held_out(reader, reader.head, HeldOut(samples, range(len(samples))))
    return {name: found[name] for name in ("kl", "agreement", "entropy")}


def of_training(model: Path) -> dict[str, object]:
    """Health as training logged it, and whether it said that the run degenerates; nothing of what was not trained."""
    if not (model / LOG).is_file():
        return {}
    log = [entry for line in (model / LOG).read_text().splitlines() if "loss" in (entry := json.loads(line))]
    warned = [warning for session in read_sessions(model) for warning in session.warnings]
    return {
        "repeating": fmean(step["repeating"] for step in log[-END:]),
        "degenerated": any("degenerat" in warning for warning in warned),
    }
