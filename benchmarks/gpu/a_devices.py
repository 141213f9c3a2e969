"""a. Correctness on the device: the objective and its kernel, and one run of every stage, beside the same on the CPU.

    python benchmarks/gpu/a_devices.py [--out DIR] [--seconds 240] [--tiny]

The objective is compared with the reference in float64. The stages run twice on tiny float32 models: on the device, and
in a process that sees no GPU; scores, metrics and weights are compared. Sampled ids depend on the device, so both score
and train on the rollouts that the device sampled. Figures are the largest differences; beyond its bound a row fails.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

from benchmarks.gpu.common import Figure, Figures, Options, parse_options
from tests.helpers.models import save_tiny_model
from tests.helpers.prompts import write_prompts
from tsdkd.cli import app
from tsdkd.core import Head, TeacherHidden, TSDKDConfig, token_selective_loss, token_selective_loss_from_hidden
from tsdkd.stages.metrics.log import METRICS_FILE
from tsdkd.stages.models.attributes import replaced_attribute

BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 0.02}
FORMULAS = {
    "JSD": TSDKDConfig(k=4),
    "forward KL": TSDKDConfig(k=4, beta=0.0, temperature=2.0),
    "reverse KL": TSDKDConfig(k=4, beta=1.0),
    "skew KL": TSDKDConfig(k=4, divergence="skew-kl", skew=0.3),
}
TRAINING = "--precision float32 --learning-rate 1e-3 --epochs 1 --batch-size 4 --micro-batch-size 2 --k 4"
SAMPLING = "--engine transformers --max-new-tokens 8"
MODELS = "--student {models}/student --teacher {models}/teacher"
OFFLINE = {
    "full": "",
    "LoRA": "--lora --lora-rank 4",
    "gradient checkpointing": "--gradient-checkpointing",
    "compiled": "--compile",
    "held-out": "--held-out 0.4 --eval-steps 1",
    "bfloat16": "--precision bfloat16",
}
STAGE_BOUNDS = {"bfloat16": 0.05}
"""Largest relative difference of a stage's numbers; 1e-3 for the others."""
ON_DEVICE = {
    "generate": f"generate --prompts {{models}}/prompts.jsonl --rollouts {{run}}/rollouts {SAMPLING} {MODELS}",
    "generate teacher": f"generate --prompts {{models}}/prompts.jsonl --policy teacher {SAMPLING} {MODELS} "
    "--rollouts {run}/teacher",
    "generate speculative": f"generate --prompts {{models}}/prompts.jsonl --policy speculative {SAMPLING} {MODELS} "
    "--rollouts {run}/speculative",
    "train online": f"train --prompts {{models}}/prompts.jsonl --checkpoint {{run}}/online {SAMPLING} {MODELS} "
    f"{TRAINING}",
}
"""Commands whose sampled ids depend on the device; the stage only has to end."""


def compare_objective(name: str, dtype: torch.dtype, softcap: float | None, compiled: bool, options: Options) -> Figure:
    """Largest difference of loss and gradients from the reference in float64, relative to the largest value."""
    config, vocab, shape = FORMULAS[name], 999, (3, 40)
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    mask = torch.ones(shape, dtype=torch.bool)
    mask[1, 30:] = mask[2, 7:] = False
    tokens = int(mask.sum())
    student, weight = normal(tokens, 48), normal(vocab, 48) * 0.3
    teacher, teacher_weight = normal(tokens, 64), normal(vocab, 64) * 0.25
    results = []
    for exact in (True, False):
        kind, device = (torch.float64, "cpu") if exact else (dtype, options.device)
        tensors = [t.to(dtype).to(kind).to(device) for t in (student, weight, teacher, teacher_weight)]
        leaves = [tensor.requires_grad_() for tensor in tensors[:2]]
        heads = [Head(tensors[i], softcap=softcap) for i in (1, 3)]
        signal = TeacherHidden(tensors[2], heads[1])
        if exact:
            loss, _ = token_selective_loss(heads[0].logits(leaves[0]), signal, mask, config)
        else:
            loss, _ = token_selective_loss_from_hidden(
                leaves[0], heads[0], signal, mask.to(device), config, compiled=compiled
            )
        loss.backward()
        results.append([loss.detach(), *(leaf.grad for leaf in leaves)])
    pairs = [(a.cpu().double(), b.cpu().double()) for a, b in zip(*results, strict=True)]
    worst = max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)
    return _within(worst, BOUNDS[dtype])


def objective_rows(options: Options) -> dict[str, Callable[[], Figure]]:
    """A comparison for each divergence, precision and head; with --tiny for one divergence, compiled once."""
    names = list(FORMULAS)[: 1 if options.tiny else None]
    rows = {}
    for name, dtype, softcap, compiled in product(names, BOUNDS, (None, 3.0), (False, True)):
        if options.tiny and compiled and (softcap or dtype != torch.float32):
            continue
        kind = str(dtype).removeprefix("torch.")
        label = f"{name}, {kind}{', soft-cap' if softcap else ''}{', kernel' if compiled else ''}"
        rows[label] = partial(compare_objective, name, dtype, softcap, compiled, options)
    return rows


def _within(difference: float, bound: float) -> Figure:
    if not difference <= bound:
        raise ValueError(f"the difference is {difference:.2g}, the bound {bound:g}")
    return {"difference": difference, "bound": bound}


def comparable_commands() -> Iterator[tuple[str, str]]:
    yield "score", f"score --rollouts {{run}}/rollouts --scores {{out}}/scores {MODELS} --k 4 --dtype float32"
    recorded = "--rollouts {run}/rollouts --scores {out}/scores --student {models}/student"
    for name, more in OFFLINE.items():
        yield f"train {name}", f"train {recorded} --checkpoint {{out}}/{name.replace(' ', '-')} {TRAINING} {more}"


def run_command(line: str, **directories: Path) -> None:
    result = CliRunner().invoke(app, line.format(**directories).split())
    if result.exit_code:
        raise RuntimeError(f"{line}: {result.output[-2000:]}")


def run_comparable(models: Path, run: Path, out: Path) -> None:
    for _, line in comparable_commands():
        run_command(line, models=models, run=run, out=out)


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
    """Of all numbers, relative to the largest of their tensor; candidates and ranks may swap near ties."""
    names = [name for name in one if not name.endswith(("candidates", "ranks"))]
    if one.keys() != other.keys() or not names:
        raise ValueError(f"other numbers: {sorted(one.keys() ^ other.keys())[:5]}")
    return max(float((one[name] - other[name]).abs().max() / one[name].abs().max().clamp(min=1e-3)) for name in names)


class Stages:
    """The stages on the device and, in one other process, on the CPU."""

    def __init__(self, directory: Path) -> None:
        self.models, self.run, self.here, self.cpu = (directory / name for name in ("models", "run", "here", "cpu"))
        save_tiny_model(self.models / "teacher", seed=1, layers=4, width=48, padding_rows=14)
        save_tiny_model(self.models / "student", seed=2)
        write_prompts(self.models / "prompts.jsonl", 10)

    def on_device(self, name: str) -> Figure:
        run_command(ON_DEVICE[name], models=self.models, run=self.run)
        return {"result": "ended"}

    def compute_on_cpu(self) -> Figure:
        words = [sys.executable, __file__, "--on-cpu", *map(str, (self.models, self.run, self.cpu))]
        finished = subprocess.run(
            words, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, check=False
        )
        if finished.returncode:
            raise RuntimeError(finished.stderr[-2000:])
        return {"result": "ended"}

    def compare(self, name: str, line: str) -> Figure:
        run_command(line, models=self.models, run=self.run, out=self.here)
        output = line.format(models=self.models, run=self.run, out="{out}").split("{out}/")[-1].split()[0]
        difference = largest_difference(numbers(self.cpu / output), numbers(self.here / output))
        return _within(difference, STAGE_BOUNDS.get(name.removeprefix("train "), 1e-3))

    def resume(self) -> Figure:
        """A run that is stopped after its first step ends with the weights of one that is not."""
        from tsdkd.stages.train.trainer import DistillationTrainer

        line = dict(comparable_commands())["train full"].replace("/full", "/resumed") + " --save-steps 1"
        compute_loss = DistillationTrainer.compute_loss

        def stop(trainer: Any, *arguments: Any, **named: Any) -> Any:
            if trainer.state.global_step == 1:
                raise RuntimeError("stopped")
            return compute_loss(trainer, *arguments, **named)

        try:
            with replaced_attribute(DistillationTrainer, "compute_loss", stop):
                run_command(line, models=self.models, run=self.run, out=self.here)
        except RuntimeError as error:
            if "stopped" not in str(error):
                raise
        run_command(line, models=self.models, run=self.run, out=self.here)
        return _within(largest_difference(numbers(self.here / "full"), numbers(self.here / "resumed")), 1e-6)

    def evaluate(self) -> Figure:
        """Divergence from the teacher on the rollouts; without lm-eval's benchmarks, which need their data."""
        from tsdkd.stages.data.held_out import HeldOut, measure_held_out
        from tsdkd.stages.data.offline import OfflineSource
        from tsdkd.stages.models.load import load_model

        source = OfflineSource(self.run / "rollouts", self.here / "scores")
        kls = []
        for device in ("cpu", None):
            model = load_model(str(self.models / "student"), "float32", device)
            kls.append(measure_held_out(model, model.head, HeldOut(source, range(len(source))))["kl"])
        return _within(abs(kls[0] - kls[1]), 1e-4)


def main() -> None:
    if sys.argv[1:2] == ["--on-cpu"]:
        run_comparable(*map(Path, sys.argv[2:5]))
        return
    options = parse_options(__doc__)
    figures, objectives = Figures("a_devices", options), objective_rows(options)
    for name, work in objectives.items():
        figures.measure(name, work)
    with TemporaryDirectory() as directory:
        stages = Stages(Path(directory))
        rows = {name: partial(stages.on_device, name) for name in ON_DEVICE}
        rows |= {"the stages on the CPU": stages.compute_on_cpu}
        rows |= {name: partial(stages.compare, name, line) for name, line in comparable_commands()}
        rows |= {"resume": stages.resume, "held-out divergence": stages.evaluate}
        if any(name not in figures.values for name in rows):  # later rows read what earlier ones write
            for name in rows:
                figures.values.pop(name, None)
        for name, work in rows.items():
            figures.measure(name, work)
    figures.finish("correctness on the device", ["difference", "bound", "result"], [*objectives, *rows])


if __name__ == "__main__":
    main()
