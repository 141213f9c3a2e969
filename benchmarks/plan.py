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

from tsdkd.artifacts import Artifact
from tsdkd.cli.defaults import PROMPTS, embedded_student, embedded_teacher
from tsdkd.stages.config import EvalConfig, GenerateConfig, ScoreConfig, TrainConfig
from tsdkd.stages.eval import evaluate
from tsdkd.stages.generate import generate
from tsdkd.stages.models import default_device
from tsdkd.stages.planning import estimates
from tsdkd.stages.planning.chain import Chain
from tsdkd.stages.planning.models import find
from tsdkd.stages.planning.rates import measure
from tsdkd.stages.score import score
from tsdkd.stages.train import train
from tsdkd.stages.training.learning import precision_of

RESPONSES = 48
OPTIONS = {"engine": "transformers", "temperature": 0.5, "max_new_tokens": 32, "batch_size": 16}
TRAIN = TrainConfig(epochs=1, batch_size=8, learning_rate=3e-5)


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else RESPONSES
    teacher, student = embedded_teacher(), embedded_student()
    sampling, asked = GenerateConfig(**OPTIONS, limit=count), EvalConfig(tasks=("embedded",), limit=count)  # type: ignore[arg-type]
    small, large = find(student), find(teacher)
    clock = time.process_time if default_device() == "cpu" else time.perf_counter
    with patch("tsdkd.stages.planning.rates.time.perf_counter", clock):
        rates = measure()
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
            lambda: train(rollouts, scores, student, run / "checkpoint", TRAIN),
            lambda: estimates.train(small, large, texts(), TRAIN, precision_of(TRAIN), rates),
        )
        row(
            "eval",
            lambda: evaluate(student, run / "results", asked),
            lambda: estimates.evaluate([small], None, asked, rates),
        )
    Console().print(f"{rates.flops / 1e9:,.1f} GFLOP/s, {rates.bytes / 1e9:,.1f} GB/s", table)


if __name__ == "__main__":
    main()
