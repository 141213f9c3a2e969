"""Compares the estimates of `tsdkd plan` with the measured cost of each stage, on the embedded pair.

    python benchmarks/plan.py [RESPONSES]

On a CPU, rates and stages are timed in processor seconds, which exclude other work on the machine. Estimates use the
real lengths of the rollouts; a plan made before `tsdkd generate` knows only an upper bound.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

from rich.console import Console
from rich.table import Table

from tsdkd.artifacts.reader import Artifact
from tsdkd.cli.defaults import PROMPTS, embedded_student, embedded_teacher
from tsdkd.stages.config.eval import EvalConfig
from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.config.score import ScoreConfig
from tsdkd.stages.config.train import TrainConfig
from tsdkd.stages.eval.stage import evaluate
from tsdkd.stages.generate.stage import generate
from tsdkd.stages.models.device import default_device, forward_precision
from tsdkd.stages.plan import estimates
from tsdkd.stages.plan.chain import Chain, Workload
from tsdkd.stages.plan.models import load_planned_model
from tsdkd.stages.plan.rates import measure_rates
from tsdkd.stages.score.stage import score
from tsdkd.stages.train.stage import train_offline

RESPONSES = 48
OPTIONS = {"engine": "transformers", "temperature": 0.5, "max_new_tokens": 32, "batch_size": 16}
TRAIN = TrainConfig(epochs=1, batch_size=8, learning_rate=3e-5)


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else RESPONSES
    teacher, student = embedded_teacher(), embedded_student()
    sampling = GenerateConfig(**OPTIONS, limit=count)  # type: ignore[arg-type]
    evaluation = EvalConfig(tasks=("embedded",), limit=count)
    small, large = load_planned_model(student), load_planned_model(teacher)
    clock = time.process_time if default_device() == "cpu" else time.perf_counter
    with patch("tsdkd.stages.plan.rates.time.perf_counter", clock):
        rates = measure_rates()
    table = Table("stage", "estimated s", "measured s", "estimated / measured", "disk estimated / written")

    with tempfile.TemporaryDirectory() as directory:
        run = Path(directory)
        rollouts, scores = run / "rollouts", run / "scores"

        def workload() -> Workload:
            return Chain({}).rollouts(rollouts)

        def add_row(stage: str, work: Callable[[], Artifact], estimate: Callable[[], estimates.Estimate]) -> None:
            start = clock()
            artifact = work()
            measured, estimated = clock() - start, estimate()
            written = sum(part.bytes for part in artifact.manifest.parts)
            seconds = [f"{estimated.seconds:,.1f}", f"{measured:,.1f}"]
            table.add_row(stage, *seconds, f"{estimated.seconds / measured:.2f}", f"{estimated.disk / written:.2f}")

        add_row(
            "generate",
            lambda: generate(PROMPTS, student, rollouts, sampling),
            lambda: estimates.estimate_generate([(small, 1.0)], workload(), sampling, rates),
        )
        add_row(
            "score",
            lambda: score(rollouts, student, teacher, scores, ScoreConfig()),
            lambda: estimates.estimate_score(small, [(large, 1.0)], workload(), ScoreConfig(), rates),
        )
        add_row(
            "train",
            lambda: train_offline(rollouts, scores, student, run / "checkpoint", TRAIN),
            lambda: estimates.estimate_train(
                small, [(large, 1.0)], workload(), TRAIN, forward_precision(TRAIN.precision), rates
            ),
        )
        add_row(
            "eval",
            lambda: evaluate(student, run / "results", evaluation),
            lambda: estimates.estimate_eval([small], None, evaluation, rates),
        )
    Console().print(f"{rates.flops_per_second / 1e9:,.1f} GFLOP/s, {rates.bytes_per_second / 1e9:,.1f} GB/s", table)


if __name__ == "__main__":
    main()
