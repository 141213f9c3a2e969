"""f. A study on a real pair: SmolLM2-135M-Instruct, and the same model without some layers as its student.

    python -m benchmarks.gpu.f_study --prompts FILE.parquet --data DIR [--work DIR] [--out DIR] [--seconds 200] [--tiny]

Offline in rounds, after a supervised start on the teacher's responses: GKD, TSD-KD, and TSD-KD without some terms. A
figure is one round of one arm: it samples from the round before, scores, trains one epoch, and evaluates. The queue is
ordered by worth: one seed at the paper's learning rate, then other seeds and rates. All work is done by `tsdkd`
commands, which skip what is complete and resume what is not, so the same line continues a stopped queue.

FILE: prompts for --prompts of tsdkd, 10,000 to train on and 200 to measure on. DIR: copies of the benchmarks' datasets
(docs/evaluation.md). --work: artifacts, up to about 15 GB; rollouts and scores of later rounds are removed once
their checkpoint is complete. "documents" of a figure holds each document's score, for paired comparisons.
"""

import json
import math
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from benchmarks.gpu.device import SECONDS, open_figures, options_of
from benchmarks.gpu.figures import Figure, Figures, Options, OutOfTimeError, argument_parser, start
from tsdkd.artifacts.files import MANIFEST_FILE
from tsdkd.artifacts.manifest import load_manifest
from tsdkd.stages.metrics.log import METRICS_FILE, is_step

ROOT = Path(__file__).parents[2]
SAVING_SECONDS = 25
"""The time that a command has to save its work at the end."""
ARMS = {
    "GKD": "--method gkd --beta 0.9",
    "TSD-KD": "",
    "direct, gated": "--alpha 0 --em-weight 0",
    "direct, indirect": "--em-weight 0",
    "direct, entropy": "--alpha 0",
}
"""Options of `train`."""
TRAINED = ("student_entropy", "top1_agreement", "repeating")
"""Health of the last training step."""


@dataclass(frozen=True)
class Scale:
    """Sizes; the options of each command."""

    prompts: int = 10_000
    held_out: int = 200
    drop: int = 6
    rounds: int = 3
    arms: tuple[str, ...] = tuple(ARMS)
    settings: tuple[tuple[float, int], ...] = ((5e-6, 0), (5e-6, 1), (5e-6, 2), (2e-5, 0), (1e-4, 0))
    """Learning rate and seed, in the order of their worth."""
    tasks: tuple[str, ...] = ("gsm8k", "sciq", "mmlu-stem")
    generate: str = (
        "--engine transformers --batch-size 1024 --part-size 1024 --max-prompt-tokens 256 --max-new-tokens 256"
    )
    score: str = "--batch-tokens 32768"
    train: str = "--batch-size 128 --micro-batch-size 32"
    start: str = "--method supervised-kd --epochs 2 --learning-rate 1e-4"
    evaluate: str = "--limit 400 --max-new-tokens 256"


TINY = Scale(
    prompts=8,
    held_out=2,
    drop=1,
    rounds=2,
    arms=("GKD", "TSD-KD"),
    settings=((5e-6, 0),),
    tasks=("gsm8k", "sciq"),
    generate="--engine transformers --max-prompt-tokens 256 --max-new-tokens 4",
    score="",
    train="--batch-size 4 --micro-batch-size 2 --precision float32",
    start="--method supervised-kd --epochs 1 --learning-rate 1e-4",
    evaluate="--limit 2 --max-new-tokens 4",
)


@dataclass(frozen=True)
class Round:
    """One round of one arm."""

    arm: str
    rate: float
    seed: int
    number: int

    @property
    def name(self) -> str:
        return f"{self.arm}, {self.rate:g}, seed {self.seed}, round {self.number}"

    @property
    def slug(self) -> str:
        return self.name.replace(", ", "-").replace(" ", "-")


def queue(scale: Scale) -> Iterator[Round]:
    for rate, seed in scale.settings:
        for number in range(1, scale.rounds + 1):
            yield from (Round(arm, rate, seed, number) for arm in scale.arms)


def run_tsdkd(command: str, log: Path, seconds: float) -> None:
    """Run a command of tsdkd, its output in `log`; Raises OutOfTimeError, or RuntimeError with the output's end."""
    words = [sys.executable, "-m", "tsdkd", *command.split()]
    with log.open("a") as output:
        output.write(f"\ntsdkd {command}\n")
        output.flush()
        process = start(words, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        try:
            code = process.wait(max(0, seconds))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(SAVING_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            raise OutOfTimeError from None
    if code:
        raise RuntimeError(f"tsdkd {command}: exit code {code}\n{log.read_text()[-2000:]}")


class Study:
    """The study in a directory of artifacts."""

    def __init__(self, work: Path, teacher: str, prompts: Path, data: Path, scale: Scale, options: Options) -> None:
        self.work, self.teacher, self.prompts, self.data = work, teacher, prompts, data
        self.scale, self.options = scale, options
        self.pruned, self.start = work / "pruned", work / "start" / "checkpoint"

    def make(self, artifact: Path, command: str) -> None:
        """Run the command that makes an artifact, unless it is complete."""
        if is_complete(artifact):
            return
        if self.options.seconds_left < 0:
            raise OutOfTimeError
        run_tsdkd(command, self.work / "log.txt", self.options.seconds_left)

    def prepare(self) -> None:
        """The prompts, the student, its supervised start, and the teacher's held-out responses."""
        scale, work = self.scale, self.work
        work.mkdir(parents=True, exist_ok=True)
        rows = pq.read_table(self.prompts)
        if len(rows) < scale.prompts + scale.held_out:
            raise SystemExit(f"{self.prompts} has {len(rows):,} prompts; give {scale.prompts + scale.held_out:,}.")
        for name, first, count in (("prompts", 0, scale.prompts), ("held-out", scale.prompts, scale.held_out)):
            if not (work / f"{name}.parquet").exists():
                pq.write_table(rows.slice(first, count), work / "slice.tmp")
                (work / "slice.tmp").rename(work / f"{name}.parquet")
        if not self.pruned.exists():
            self.make(
                self.pruned,
                f"prune --teacher {self.teacher} --prompts {work}/prompts.parquet --drop {scale.drop} "
                f"--output {self.pruned}",
            )
        for name, prompts in (("held-out", "held-out"), ("start", "prompts")):
            self.make(
                work / name / "rollouts",
                f"generate --run {work}/{name} --policy teacher --teacher {self.teacher} "
                f"--prompts {work}/{prompts}.parquet {scale.generate}",
            )
            self.score(work / name, self.pruned)
        self.make(self.start, f"train --run {work}/start --student {self.pruned} {scale.train} {scale.start}")

    def score(self, run: Path, student: Path) -> None:
        self.make(run / "scores", f"score --run {run} --student {student} --teacher {self.teacher} {self.scale.score}")

    def evaluate(self, name: str, model: str | Path) -> Figure:
        self.prepare()
        started = time.monotonic()
        results = self.work / "results"
        self.make(
            results / name,
            f"eval --model {name}={model} --results {results} --data {self.data} --tasks {','.join(self.scale.tasks)} "
            f"--held-out {self.work}/held-out {self.scale.evaluate}",
        )
        return self.read_results(results / name) | {"minutes": (time.monotonic() - started) / 60}

    def read_results(self, results: Path) -> Figure:
        summary: dict[str, Any] = load_manifest(results).summary
        figure: Figure = {name: summary["held_out"][name] for name in ("kl", "top1_agreement", "entropy")}
        for task in self.scale.tasks:
            measured = summary[task]
            figure |= {task: 100 * measured["value"], f"{task} s.e.": 100 * measured["stderr"]}
            rows = pq.read_table(results / f"{task}.parquet", filters=[("metric", "==", measured["metric"])])
            figure[f"{task} documents"] = "".join(str(round(score)) for score in rows["score"].to_pylist())
        return figure

    def round(self, run: Round) -> Figure:
        """Rollouts of the student before, their scores, one epoch, evaluation."""
        self.prepare()
        started, scale = time.monotonic(), self.scale
        directory = self.work / run.slug
        student, data = self.start, self.work / f"seed-{run.seed}"  # the first rollouts are those of all arms
        if run.number > 1:
            before = Round(run.arm, run.rate, run.seed, run.number - 1)
            student, data = self.work / before.slug / "checkpoint", directory
            if not student.exists():
                self.round(before)
        checkpoint = directory / "checkpoint"
        if not is_complete(checkpoint):
            self.make(
                data / "rollouts",
                f"generate --run {data} --student {student} --prompts {self.work}/prompts.parquet {scale.generate} "
                f"--seed {1000 * run.seed + run.number}",
            )
            self.score(data, student)
            self.make(
                checkpoint,
                f"train --run {data} --checkpoint {checkpoint} --student {student} --seed {run.seed} --epochs 1 "
                f"--learning-rate {run.rate} {scale.train} {ARMS[run.arm]}",
            )
        if run.number > 1:
            for name in ("rollouts", "scores"):
                shutil.rmtree(data / name, ignore_errors=True)
        figure = self.evaluate(run.slug, checkpoint) | read_health(checkpoint)
        return figure | {"minutes": (time.monotonic() - started) / 60}


def read_health(checkpoint: Path) -> Figure:
    """Of the last training step."""
    steps = list(filter(is_step, map(json.loads, (checkpoint / METRICS_FILE).read_text().splitlines())))
    return {f"{name} in training": steps[-1][name] for name in TRAINED}


def is_complete(artifact: Path) -> bool:
    return (artifact / MANIFEST_FILE).exists() and load_manifest(artifact).state == "complete"


def run_queue(study: Study, figures: Figures) -> list[str]:
    """Measure what is not measured, in the order of worth -> the names of all figures."""
    models = {"teacher": study.teacher, "pruned": study.pruned, "start": study.start}
    rows = {name: partial(study.evaluate, name, model) for name, model in models.items()}
    rows |= {run.name: partial(study.round, run) for run in queue(study.scale)}
    for name, work in rows.items():
        figures.measure(name, work)
    return list(rows)


def main() -> None:
    parser = argument_parser(__doc__, SECONDS)
    parser.add_argument("--prompts", type=Path, required=True, help="a Parquet file of prompts")
    parser.add_argument("--data", type=Path, required=True, help="a directory of the benchmarks' datasets")
    parser.add_argument("--work", type=Path, default=Path("runs/gpu-study"), help="directory of the artifacts")
    parser.add_argument("--teacher", default="embedded-teacher", help="model directory (default: embedded-teacher)")
    arguments = parser.parse_args()
    options = options_of(parser, arguments)
    scale = TINY if options.tiny else Scale()
    columns = [*scale.tasks, "kl", "top1_agreement", "entropy", "student_entropy in training", "minutes"]
    title = f"f. {arguments.teacher}, {scale.drop} layers removed, {scale.prompts:,} prompts a round"
    paths = (arguments.prompts.resolve(), arguments.data.resolve())
    study = Study(arguments.work.resolve(), arguments.teacher, *paths, scale, options)
    figures = open_figures("f_study", title, columns, options, attempts=math.inf)
    figures.finish(run_queue(study, figures))


if __name__ == "__main__":
    main()
