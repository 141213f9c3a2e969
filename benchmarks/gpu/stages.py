"""One run of every stage on tiny float32 models, on the device and in a process that sees no GPU, and their numbers."""

import json
import os
import subprocess
import sys
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

from benchmarks.gpu.figures import Figure, within
from tests.helpers.models import save_tiny_model
from tests.helpers.prompts import write_prompts
from tsdkd.artifacts.manifest import load_manifest
from tsdkd.cli import app
from tsdkd.stages.data.held_out import HeldOut, measure_held_out
from tsdkd.stages.data.offline import OfflineSource
from tsdkd.stages.metrics.log import METRICS_FILE
from tsdkd.stages.models.attributes import replaced_attribute
from tsdkd.stages.models.load import load_model
from tsdkd.stages.train.trainer import DistillationTrainer

ROOT = Path(__file__).parents[2]
MODELS = "--student {models}/student --teacher {models}/teacher"
PROMPTS = "--prompts {models}/prompts.jsonl"
SAMPLING = "--engine transformers --max-new-tokens 8"
TRAINING = "--precision float32 --learning-rate 1e-3 --epochs 1 --batch-size 4 --micro-batch-size 2 --k 4"
ON_DEVICE = {
    "generate": f"generate {PROMPTS} --rollouts {{output}} {SAMPLING} --student {{models}}/student",
    "generate teacher": f"generate {PROMPTS} --rollouts {{output}} {SAMPLING} --policy teacher "
    "--teacher {models}/teacher",
    "generate speculative": f"generate {PROMPTS} --rollouts {{output}} {SAMPLING} --policy speculative {MODELS}",
    "train online": f"train {PROMPTS} --checkpoint {{output}} {SAMPLING} {MODELS} {TRAINING}",
}
"""Commands whose sampled ids depend on the device; the stage only has to end."""
TRAININGS = {
    "full": "",
    "LoRA": "--lora --lora-rank 4",
    "gradient checkpointing": "--gradient-checkpointing",
    "compiled": "--compile",
    "held-out": "--held-out 0.4 --eval-steps 1",
    "bfloat16": "--precision bfloat16",
}
COMPARABLE = {
    "score": f"score --rollouts {{run}}/generate --scores {{output}} {MODELS} --k 4 --dtype float32",
    **{
        f"train {name}": "train --rollouts {run}/generate --scores {scores} --student {models}/student "
        f"--checkpoint {{output}} {TRAINING} {options}"
        for name, options in TRAININGS.items()
    },
}
ROUNDED = "train bfloat16"
"""Its distance from the float32 run on the CPU may be `ROUNDED_BOUND` times the distance of the same run on the CPU."""
ROUNDED_BOUND = 1.5
COMPARED_WITH = dict.fromkeys(("train compiled", "train gradient checkpointing", ROUNDED), "train full")
"""Rows that are compared with another row on the CPU, where their option must change nothing but rounding."""
STAGE_BOUND = 1e-3
"""Largest relative difference of a stage's numbers."""
RESUME_BOUND = 1e-4
"""GPUs add in varying order; on a CPU the difference is 0."""


def output_of(name: str, directory: Path) -> Path:
    """The output of a command of `ON_DEVICE` or `COMPARABLE`."""
    return directory / name.replace(" ", "-")


def run_command(command: str, **paths: Path) -> None:
    result = CliRunner().invoke(app, command.format(**paths).split())
    if result.exit_code:
        raise RuntimeError(f"{command}: {result.output[-2000:]}")


def run_comparable(name: str, models: Path, run: Path, output: Path, more: str = "") -> None:
    run_command(f"{COMPARABLE[name]} {more}", models=models, run=run, scores=output.with_name("score"), output=output)


def numbers(directory: Path) -> dict[str, Tensor]:
    """Every number of an artifact by name: columns of tables, metrics, weights."""
    found: dict[str, Tensor] = {}
    for part in sorted(directory.glob("*.parquet")):
        for column in (name for name in pq.read_schema(part).names if name != "sample_id"):
            values = pq.read_table(part, columns=[column])[column].combine_chunks()
            flat = values.flatten() if hasattr(values, "flatten") and values.type.num_fields else None
            if flat is not None and len(flat):
                found[f"{part.name} {column}"] = torch.tensor(flat.to_numpy(zero_copy_only=False)).double()
    if (directory / METRICS_FILE).exists():
        for line in (directory / METRICS_FILE).read_text().splitlines():
            found |= {f"{name} {len(found)}": torch.tensor(float(value)) for name, value in json.loads(line).items()}
    for file in directory.glob("*.safetensors"):
        found |= {f"{file.name} {name}": value.double() for name, value in load_file(file).items()}
    return found


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Of all numbers, relative to the largest of their tensor; candidates and ranks may swap near ties.

    A metric may be near zero, such as the drift of a student that hardly moved: below 1 its difference is absolute.
    """
    names = [name for name in one if not name.endswith(("candidates", "ranks"))]
    if one.keys() != other.keys() or not names:
        raise ValueError(f"other numbers: {sorted(one.keys() ^ other.keys())[:5]}")
    return max(
        float((value - other[name]).abs().max() / value.abs().max().clamp(min=1e-3 if value.ndim else 1.0))
        for name, value in ((name, one[name]) for name in names)
    )


class Stages:
    """The stages on the device and, in one other process, on the CPU. What a row needs, it makes first."""

    def __init__(self, directory: Path) -> None:
        self.models, self.run, self.here, self.cpu = (directory / name for name in ("models", "run", "here", "cpu"))
        save_tiny_model(self.models / "teacher", seed=1, layers=4, width=48, padding_rows=14)
        save_tiny_model(self.models / "student", seed=2)
        write_prompts(self.models / "prompts.jsonl", 10)

    def on_device(self, name: str) -> Figure:
        """Run a command whose output is not compared, unless its output exists."""
        output = output_of(name, self.run)
        if not output.exists():
            run_command(ON_DEVICE[name], models=self.models, run=self.run, output=output)
        return {"result": "ok"}

    @cached_property
    def reference(self) -> Path:
        """Outputs of the comparable commands on the CPU."""
        self.on_device("generate")
        finished = subprocess.run(
            [sys.executable, "-m", "benchmarks.gpu.stages", *map(str, (self.models, self.run, self.cpu))],
            cwd=ROOT,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            check=False,
        )
        if finished.returncode:
            raise RuntimeError(finished.stderr[-2000:])
        return self.cpu

    def compare(self, name: str) -> Figure:
        self.make(name)
        reference = numbers(output_of(COMPARED_WITH.get(name, name), self.reference))
        bound = STAGE_BOUND
        if name == ROUNDED:
            bound = ROUNDED_BOUND * largest_difference(reference, numbers(output_of(name, self.reference)))
        return within(largest_difference(reference, numbers(output_of(name, self.here))), bound)

    def make(self, name: str) -> None:
        self.on_device("generate")
        if name != "score":
            self.make("score")
        if not (output := output_of(name, self.here)).exists():
            run_comparable(name, self.models, self.run, output)

    def resume(self) -> Figure:
        """A run that is stopped after its first step ends with the weights of one that is not."""
        self.make("train full")
        resumed, options = self.here / "resumed", "--save-steps 1"
        compute_loss = DistillationTrainer.compute_loss

        def stop(trainer: Any, *arguments: Any, **named: Any) -> Any:
            if trainer.state.global_step == 1:
                raise RuntimeError("stopped")
            return compute_loss(trainer, *arguments, **named)

        try:
            with replaced_attribute(DistillationTrainer, "compute_loss", stop):
                run_comparable("train full", self.models, self.run, resumed, options)
        except RuntimeError as error:
            if "stopped" not in str(error):
                raise
        run_comparable("train full", self.models, self.run, resumed, options)
        whole = output_of("train full", self.here)
        return within(largest_difference(numbers(whole), numbers(resumed)), RESUME_BOUND)

    def evaluate(self) -> Figure:
        """A benchmark of lm-eval and the divergence from the teacher, on the device."""
        self.make("score")
        held_out, results = self.here / "recorded", self.here / "results"
        held_out.mkdir()
        (held_out / "rollouts").symlink_to(output_of("generate", self.run))
        (held_out / "scores").symlink_to(output_of("score", self.here))
        run_command(
            "eval --model student={models}/student --tasks embedded --limit 4 --held-out {recorded} "
            "--results {results}",
            models=self.models,
            recorded=held_out,
            results=results,
        )
        accuracy = load_manifest(results / "student").summary["embedded"]["value"]
        return {"result": "ok", "accuracy": accuracy}

    def held_out(self) -> Figure:
        """The divergence from the teacher on the rollouts, on the device and on the CPU."""
        self.make("score")
        source = OfflineSource(output_of("generate", self.run), output_of("score", self.here))
        kls = []
        for device in ("cpu", None):
            model = load_model(str(self.models / "student"), "float32", device)
            kls.append(measure_held_out(model, model.head, HeldOut(source, range(len(source))))["kl"])
        return within(abs(kls[0] - kls[1]), 1e-4)


def main(models: Path, run: Path, out: Path) -> None:
    """Run the comparable commands on this process's device."""
    for name in COMPARABLE:
        if name == ROUNDED or name not in COMPARED_WITH:
            run_comparable(name, models, run, output_of(name, out))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
