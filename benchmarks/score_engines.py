"""tsdkd score by transformers and by vLLM on the same rollouts: tokens per second, and the differences of the scores.

    python benchmarks/score_engines.py ROLLOUTS STUDENT TEACHER [MEMORY_FRACTION]

Both run one after the other, and each loads the models. Rates count prompt and response tokens, and exclude loading,
the check and the estimate of the cost.
"""

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from tsdkd.artifacts.reader import Artifact, read_artifact
from tsdkd.stages.config.score import ScoreConfig
from tsdkd.stages.data.rollout_lengths import LENGTH_COLUMNS, sequence_lengths
from tsdkd.stages.observer import SilentObserver
from tsdkd.stages.score.stage import score

VALUES = ("student_entropy", "teacher_entropy", "student_log_prob", "teacher_log_prob")
LISTS = ("candidates", "ranks")


class ClockObserver(SilentObserver):
    """Records when the scoring of parts starts, and prints the checks."""

    started = 0.0

    def info(self, message: str) -> None:
        print(message)

    @contextmanager
    def progress(self, *_: Any) -> Iterator[Callable[[int], None]]:
        self.started = time.perf_counter()
        yield lambda _: None


@dataclass(frozen=True)
class Measurement:
    scores: dict[str, np.ndarray[Any, Any]]
    """Columns by name, all responses one after the other."""
    loading_seconds: float
    scoring_seconds: float


def measure(rollouts: Path, student: str, teacher: str, config: ScoreConfig) -> Measurement:
    observer = ClockObserver()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        artifact = score(rollouts, student, teacher, Path(directory) / "scores", config, observer)
        end = time.perf_counter()
        return Measurement(_columns(artifact), observer.started - start, end - observer.started)


def _columns(scores: Artifact) -> dict[str, np.ndarray[Any, Any]]:
    table = scores.table([*VALUES, *LISTS])
    return {name: table[name].combine_chunks().flatten().to_numpy() for name in table.column_names}


def main() -> None:
    rollouts, student, teacher, *fraction = sys.argv[1:]
    memory_fraction = float(fraction[0]) if fraction else 0.5
    parent = read_artifact(Path(rollouts), "rollouts")
    tokens = sum(sum(sequence_lengths(parent.read_part(part, LENGTH_COLUMNS))) for part in parent.tables)
    table = Table("engine", "tokens", "tokens / s", "loading and check (s)")
    measurements = {}
    for engine in ("transformers", "vllm"):
        config = ScoreConfig(engine=engine, memory_fraction=memory_fraction if engine == "vllm" else 0.9)
        result = measurements[engine] = measure(Path(rollouts), student, teacher, config)
        table.add_row(engine, f"{tokens:,}", f"{tokens / result.scoring_seconds:,.0f}", f"{result.loading_seconds:.0f}")
    ours, theirs = measurements["vllm"].scores, measurements["transformers"].scores
    differences = Table("column", "mean difference", "largest")
    for name in VALUES:
        difference = np.abs(ours[name] - theirs[name])
        differences.add_row(name, f"{difference.mean():.4f} nats", f"{difference.max():.3f}")
    for name in LISTS:
        differences.add_row(name, f"{np.mean(ours[name] != theirs[name]):.1%} of places", "")
    Console().print(table, differences)


if __name__ == "__main__":
    main()
