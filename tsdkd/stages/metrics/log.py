"""The log of training, one JSON object per line: an optimizer step, or a measurement on held-out prompts."""

import json
from collections.abc import Mapping

METRICS_FILE = "metrics.jsonl"


def log_line(entry: Mapping[str, float]) -> str:
    """One line of the log, without "epoch": the Trainer's epoch counts micro-batches."""
    return json.dumps({name: value for name, value in entry.items() if name != "epoch"}, sort_keys=True) + "\n"


def is_step(entry: Mapping[str, float]) -> bool:
    """Whether an entry logs an optimizer step."""
    return "loss" in entry


def is_evaluation(entry: Mapping[str, float]) -> bool:
    """Whether an entry logs a measurement on held-out prompts."""
    return any(name.startswith("eval_") for name in entry)
