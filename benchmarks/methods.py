"""The cost of a step of each method beside GKD's: from recorded scores, with a loaded teacher, and online.

    python -m benchmarks.methods [--student S] [--teacher T] [--method NAME ...] [--mode MODE ...] [--tiny]

Each run is a `tsdkd train` in this process, on one thread, which neither estimates memory nor saves the optimizer. A
step's cost is the median CPU time of the steps after the first. GKD runs on the same responses before every `INTERVAL`
runs; a run's ratio is its cost divided by the mean of the GKD runs before and after it. Every run must have finite
losses and change the weights.
"""

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from typer.testing import CliRunner

from tsdkd.artifacts.files import TIMES_FILE
from tsdkd.cli import app
from tsdkd.cli.defaults import EMBEDDED_STUDENT, EMBEDDED_TEACHER, PROMPTS, model
from tsdkd.errors import InputError
from tsdkd.stages.methods import METHODS
from tsdkd.stages.metrics.log import METRICS_FILE, is_step, read_log
from tsdkd.stages.metrics.step_times import StepTimes
from tsdkd.stages.models.attributes import replaced_attribute
from tsdkd.stages.train import loop
from tsdkd.stages.train.saved_steps import StepSavingTrainer

INTERVAL = 8
SIGNALS = ("hidden", "topk", "ranks")
MODES = (*SIGNALS, "loaded", "online")
"""Recorded scores with each signal, a loaded teacher that reads recorded responses, and responses that are sampled."""
PARTS = ("sampling", "teacher", "student", "objective", "whole")
VARIANTS: dict[str, tuple[str, ...]] = {
    "tsdkd": ("--opener adaptive", "--direct-weight 0"),
    "se-kd": ("--method-option direction=reverse",),
    "iw-opd": ("--method-option sampled=true",),
}
"""Options with which a method reads other values, or needs other data."""
POLICIES = {"student": "student", "teacher": "teacher", "both": "speculative"}
"""The policy of recorded responses, by the first author that a method learns from."""


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    steps: int = 4
    batch: int = 2
    """Responses of a step, read at once."""
    tokens: int = 32
    """The length of the longest response."""
    top_k: int = 64


TINY = Size(steps=2, batch=2, tokens=6, top_k=16)


class Arm(NamedTuple):
    """A method with some options of `tsdkd train`."""

    name: str
    options: str = ""

    def __str__(self) -> str:
        return f"{self.name} {self.options.replace('--method-option ', '').replace('--', '')}".strip()

    @property
    def policy(self) -> str:
        """The policy of the recorded responses."""
        return POLICIES[METHODS[self.name].authors[0]]


GKD = Arm("gkd")


@dataclass(frozen=True)
class Run:
    """A training run: its refusal, or its cost."""

    refusal: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """CPU seconds of a step, by part."""
    losses: Sequence[float] = ()
    changed: float = 0.0
    """The fraction of the weights that training changed."""
    ratio: float = math.nan
    """Its step's seconds divided by GKD's; nan where GKD is refused, and for GKD."""

    @property
    def trained(self) -> bool:
        """Whether all losses are finite, and weights changed."""
        return bool(self.losses) and all(map(math.isfinite, self.losses)) and self.changed > 0

    def __str__(self) -> str:
        if self.refusal:
            return f"refused: {self.refusal}"
        parts = ", ".join(f"{part} {self.seconds[part]:.2f}" for part in PARTS)
        losses = f"loss {self.losses[0]:.4g} -> {self.losses[-1]:.4g}"
        fault = "" if self.trained else "NOT TRAINED: "
        return f"{fault}CPU s: {parts}; {losses}; {self.changed:.1%} of weights changed"

    @property
    def cost(self) -> str:
        """Its ratio to GKD, or its seconds where there is none."""
        return f"{self.seconds['whole']:.2f} s" if math.isnan(self.ratio) else f"{self.ratio:.2f}"


def tsdkd(*words: object) -> None:
    """Run a command. Raises InputError with the cause if it refuses."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exit_code == InputError.exit_code:
        cause = next(line for line in result.stderr.splitlines() if line.startswith("error:"))
        raise InputError(cause.removeprefix("error:").strip(), "")
    if result.exit_code:
        raise SystemExit(f"tsdkd {' '.join(map(str, words))}\n{result.output}") from result.exception


Runs = dict[tuple[Arm, str], Run]
"""By arm and mode."""


@dataclass(frozen=True)
class Bench:
    """One pair of models in a workspace."""

    workspace: Path
    student: str
    teacher: str
    size: Size
    console: Console

    @property
    def sampling(self) -> list[object]:
        """Options of sampling, with as many prompts as the steps take responses."""
        limit = self.size.steps * self.size.batch
        return ["--engine", "transformers", "--max-new-tokens", self.size.tokens, "--limit", limit]

    def record(self, policy: str, signals: Sequence[str]) -> None:
        """Record responses and their scores with these signals."""
        rollouts = ["--rollouts", self.workspace / policy / "rollouts"]
        student, teacher = ["--student", self.student], ["--teacher", self.teacher]
        models = {"student": student, "teacher": teacher}.get(policy, student + teacher)
        tsdkd("generate", "--policy", policy, *models, *rollouts, "--prompts", PROMPTS, *self.sampling)
        for signal in signals:
            scores = ["--scores", self.workspace / policy / signal, "--signal", signal, "--top-k", self.size.top_k]
            tsdkd("score", *student, *teacher, *rollouts, *scores)

    def run(self, arm: Arm, mode: str, policy: str) -> Run:
        """Train the student, and show the result."""
        run = self._train(arm, mode, policy)
        self.console.print(f"{policy}, {mode}, {arm}: {run}", highlight=False, soft_wrap=True)
        return run

    def _train(self, arm: Arm, mode: str, policy: str) -> Run:
        method, output = METHODS[arm.name], self.workspace / "checkpoint"
        data: list[object] = ["--rollouts", self.workspace / policy / "rollouts"]
        if mode in SIGNALS:
            data += ["--scores", self.workspace / policy / mode] if method.needs_teacher else []
        else:
            sampled = int(mode == "online")
            prompts = ["--prompts", PROMPTS] if sampled and not method.uses_replay else data
            share = (
                ["--phi", sampled, "--held-out", 0.45, "--eval-steps", 2]
                if method.uses_replay
                else ["--lambda", sampled]
            )
            data = [*prompts, "--teacher", self.teacher, *share, *self.sampling]
        size = "--epochs", 1, "--batch-size", self.size.batch, "--micro-batch-size", self.size.batch
        more = "--warmup-ratio", 0, "--checkpoint", output, "--overwrite"
        try:
            tsdkd("train", "--method", arm.name, *arm.options.split(), "--student", self.student, *data, *size, *more)
        except InputError as error:
            return Run(refusal=error.cause)
        steps = read_log(output / TIMES_FILE)
        seconds = {part: statistics.median(step.get(part, 0.0) for step in steps[1:] or steps) for part in PARTS}
        losses = [entry["loss"] for entry in read_log(output / METRICS_FILE) if is_step(entry)]
        return Run(seconds=seconds, losses=losses, changed=_changed(Path(self.student), output))

    def group(self, arms: Sequence[Arm], mode: str, policy: str) -> Iterator[tuple[Arm, Run]]:
        """GKD, and runs on the same responses with their ratios to the GKD runs around them."""
        after = self.run(GKD, mode, policy)
        yield GKD, after
        for start in range(0, len(arms), INTERVAL):
            runs = [(arm, self.run(arm, mode, policy)) for arm in arms[start : start + INTERVAL]]
            before, more = after, start + INTERVAL < len(arms) and not after.refusal
            after = self.run(GKD, mode, policy) if more else before
            for arm, run in runs:
                if run.refusal or before.refusal:
                    yield arm, run
                else:
                    gkd_seconds = (before.seconds["whole"] + after.seconds["whole"]) / 2
                    yield arm, replace(run, ratio=run.seconds["whole"] / gkd_seconds)


def _changed(student: Path, checkpoint: Path) -> float:
    """The fraction of a student's weights that a checkpoint has changed, in its precision."""
    before, after = (
        {name: value for file in path.glob("*.safetensors") for name, value in load_file(file).items()}
        for path in (student, checkpoint)
    )
    different = sum(int((after[name] != before[name].to(after[name].dtype)).sum()) for name in after)
    return different / sum(value.numel() for value in after.values())


def arms_of(names: Sequence[str]) -> list[Arm]:
    """The methods of these names, or all, and their variants."""
    return [Arm(name, options) for name in names or METHODS for options in ("", *VARIANTS.get(name, ()))]


def measure(bench: Bench, arms: Sequence[Arm], modes: Sequence[str]) -> Runs:
    """The runs by arm and mode."""
    groups: dict[str, list[Arm]] = {}
    for arm in arms:
        if arm != GKD:
            groups.setdefault(arm.policy, []).append(arm)
    found: Runs = {}
    with (
        replaced_attribute(StepTimes, "_now", lambda _: time.process_time()),
        replaced_attribute(StepSavingTrainer, "_save_optimizer_and_scheduler", lambda *_: None),
        replaced_attribute(loop, "_require_memory", lambda *_: None),
    ):
        for policy, group in groups.items():
            bench.record(policy, [mode for mode in modes if mode in SIGNALS])
            for mode in modes:
                for arm, run in bench.group(group, mode, policy):
                    if (arm, mode) not in found or policy == arm.policy:
                        found[arm, mode] = run
    return found


def show(runs: Runs, console: Console) -> None:
    """The ratios of all runs, the reasons of the refusals, and whether all others trained."""
    reasons = list(dict.fromkeys(run.refusal for run in runs.values() if run.refusal))
    modes = list(dict.fromkeys(mode for _, mode in runs))
    table = Table("", *modes, title="CPU time of a step, divided by GKD's; s: in seconds; (N): refused")
    for arm in dict.fromkeys(arm for arm, _ in runs):
        found = [runs[arm, mode] for mode in modes]
        cells = [f"({reasons.index(run.refusal) + 1})" if run.refusal else run.cost for run in found]
        table.add_row(str(arm), *cells)
    console.print(table)
    for number, reason in enumerate(reasons, 1):
        console.print(f"({number}) {reason}", highlight=False, soft_wrap=True)
    trained = [run for run in runs.values() if not run.refusal]
    faults = [f"{arm}, {mode}" for (arm, mode), run in runs.items() if not run.refusal and not run.trained]
    least = min(run.changed for run in trained)
    console.print(
        f"{len(trained)} runs trained: finite losses, {least:.2%} of the weights or more changed."
        if not faults
        else f"Runs with a loss that is not finite, or without changed weights: {'; '.join(faults)}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default=EMBEDDED_STUDENT)
    parser.add_argument("--teacher", default=EMBEDDED_TEACHER)
    parser.add_argument("--method", action="append", default=[], choices=METHODS, metavar="NAME")
    parser.add_argument("--mode", action="append", default=[], choices=MODES, metavar="MODE")
    parser.add_argument("--tiny", action="store_true", help="two steps of two short responses")
    options = parser.parse_args()
    torch.set_num_threads(1)  # waiting threads take CPU time
    console = Console(width=120)
    with tempfile.TemporaryDirectory() as directory:
        size = TINY if options.tiny else Size()
        bench = Bench(Path(directory), model(options.student), model(options.teacher), size, console)
        show(measure(bench, arms_of(options.method), options.mode or MODES), console)


if __name__ == "__main__":
    main()
