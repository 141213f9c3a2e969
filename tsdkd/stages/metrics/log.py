"""The log of training, one JSON object per line: an optimizer step, or a measurement on held-out prompts."""

import json
from collections.abc import Mapping
from pathlib import Path

from tsdkd.artifacts.json_files import parse_json, read_regular_file, unreadable_error

METRICS_FILE = "metrics.jsonl"
TIMES = "seconds/"
"""Prefix of an entry's times, which are no metrics: they differ from run to run."""
MAX_BYTES = 1 << 32
"""Of a log; a step has about 1 kB."""


def log_line(entry: Mapping[str, float]) -> str:
    """One line of the log, without times, and without "epoch": the Trainer's epoch counts micro-batches."""
    metrics = {name: value for name, value in entry.items() if name != "epoch" and not name.startswith(TIMES)}
    return json.dumps(metrics, sort_keys=True) + "\n"


def times_line(entry: Mapping[str, float]) -> str:
    """One line of the file of times: the step's number, and the seconds of each part."""
    times = {name.removeprefix(TIMES): round(value, 6) for name, value in entry.items() if name.startswith(TIMES)}
    return json.dumps({"step": entry["step"]} | times) + "\n"


def read_log(file: Path) -> list[dict[str, float]]:
    """The entries of a log, without an incomplete last line. Raises ArtifactError."""
    try:
        lines = read_regular_file(file, MAX_BYTES).splitlines(keepends=True)
        return [parse_json(line, dict[str, float], finite=False) for line in lines if line.endswith(b"\n")]
    except ValueError as error:
        raise unreadable_error(file, error) from None


def is_step(entry: Mapping[str, float]) -> bool:
    """Whether an entry logs an optimizer step."""
    return "loss" in entry


def is_evaluation(entry: Mapping[str, float]) -> bool:
    """Whether an entry logs a measurement on held-out prompts."""
    return any(name.startswith("eval_") for name in entry)
