"""What `tsdkd plan` reckons beside what stages took, on the embedded pair.

    python benchmarks/plan.py [RESPONSES]

On a CPU seconds are the processor's, of rates and stages alike, so that other work on the machine does not count.
Rollouts are planned with the tokens that they turned out to have: what a plan made before knows of them is a bound.
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
from tsdkd.stages.models.device import default_device
from tsdkd.stages.plan import estimates
from tsdkd.stages.plan.chain import Chain
from tsdkd.stages.plan.models import find_planned_model
from tsdkd.stages.plan.rates import measure_rates
from tsdkd.stages.score.stage import score
from tsdkd.stages.train.loop import forward_precision
from tsdkd.stages.train.stage import train_offline

RESPONSES = 48
OPTIONS = {"engine": "transformers", "temperature": 0.5, "max_new_tokens": 32, "batch_size": 16}
TRAIN = TrainConfig(epochs=1, batch_size=8, learning_rate=3e-5)


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else RESPONSES
    teacher, student = embedded_teacher(), embedded_student()
    sampling, asked = GenerateConfig(**OPTIONS, limit=count), EvalConfig(tasks=("embedded",), limit=count)  # type: ignore[arg-type]
    small, large = find_planned_model(student), find_planned_model(teacher)
    clock = time.process_time if default_device() == "cpu" else time.perf_counter
    with patch("tsdkd.stages.plan.rates.time.perf_counter", clock):
        rates = measure_rates()
    table = Table("stage", "planned s", "took s", "planned / took", "disk planned / written")

    with tempfile.TemporaryDirectory() as directory:
        run = Path(directory)
        rollouts, scores = run / "rollouts", run / "scores"

        def texts() -> estimates.Texts:
            return Chain({}).rollouts(rollouts)

        def row(name: str, work: Callable[[], Artifact], plan: Callable[[], estimates.Estimate]) -> None:
            start = clock()
            artifact = work()
            took, found = clock() - start, plan()
            written = sum(part.bytes for part in artifact.manifest.parts)
            numbers = [found.seconds, took]
            shares = [found.seconds / took, found.disk / written]
            table.add_row(name, *(f"{number:,.1f}" for number in numbers), *(f"{share:.2f}" for share in shares))

        row(
            "generate",
            lambda: generate(PROMPTS, student, rollouts, sampling),
            lambda: estimates.generate([small], [1.0], texts(), sampling, rates),
        )
        row(
            "score",
            lambda: score(rollouts, student, teacher, scores, ScoreConfig()),
            lambda: estimates.score(small, large, texts(), ScoreConfig(), rates),
        )
        row(
            "train",
            lambda: train_offline(rollouts, scores, student, run / "checkpoint", TRAIN),
            lambda: estimates.train(small, large, texts(), TRAIN, forward_precision(TRAIN), rates),
        )
        row(
            "eval",
            lambda: evaluate(student, run / "results", asked),
            lambda: estimates.evaluate([small], None, asked, rates),
        )
    Console().print(f"{rates.flops / 1e9:,.1f} GFLOP/s, {rates.bytes / 1e9:,.1f} GB/s", table)


if __name__ == "__main__":
    main()
