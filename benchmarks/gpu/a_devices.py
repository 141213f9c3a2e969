"""a. Correctness on the device: the objective and its kernel, and one run of every stage, beside the same on the CPU.

    python -m benchmarks.gpu.a_devices [--out DIR] [--seconds 200] [--tiny]

The objective is compared with the reference on the CPU in float64: the reference itself, the chunked objective, the
comparison of two models' logits by itself, and both with the Triton kernel. The stages run twice on tiny float32
models: on the device, and in a process that sees no GPU; scores, metrics and weights are compared. Sampled ids depend
on the device, so both score and train on the rollouts that the device sampled. Figures are the largest differences;
beyond its bound a row fails.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

from benchmarks.gpu.device import measure, open_figures, parse_options
from benchmarks.gpu.figures import Figure, Options
from tests.helpers.models import save_tiny_model
from tests.helpers.prompts import write_prompts
from tsdkd.artifacts.manifest import load_manifest
from tsdkd.cli import app
from tsdkd.core import Head, TeacherHidden, TSDKDConfig, token_selective_loss, token_selective_loss_from_hidden
from tsdkd.core.gradients import BlockBuffers
from tsdkd.core.lm_head import LinearOutputs
from tsdkd.core.token_comparison import compare_by_kernel, compare_logits
from tsdkd.stages.data.held_out import HeldOut, measure_held_out
from tsdkd.stages.data.offline import OfflineSource
from tsdkd.stages.metrics.log import METRICS_FILE
from tsdkd.stages.models.attributes import replaced_attribute
from tsdkd.stages.models.load import load_model
from tsdkd.stages.train.trainer import DistillationTrainer

ROOT = Path(__file__).parents[2]
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 0.02}
FORMULAS = {
    "JSD": TSDKDConfig(k=4),
    "forward KL": TSDKDConfig(k=4, beta=0.0, temperature=2.0),
    "reverse KL": TSDKDConfig(k=4, beta=1.0),
    "skew KL": TSDKDConfig(k=4, divergence="skew-kl", skew=0.3),
}
VOCAB = 999
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
COMPARABLE = {
    "score": f"score --rollouts {{run}}/rollouts --scores {{out}}/score {MODELS} --k 4 --dtype float32",
    **{
        f"train {name}": "train --rollouts {run}/rollouts --scores {out}/score --student {models}/student "
        f"--checkpoint {{out}}/train-{name.replace(' ', '-')} {TRAINING} {more}"
        for name, more in OFFLINE.items()
    },
}
COMPARED_WITH = {"train compiled": "train full", "train gradient checkpointing": "train full"}
"""Rows that are compared with another row on the CPU, where their option must change nothing."""
STAGE_BOUNDS = {"train bfloat16": 0.05}
"""Largest relative difference of a stage's numbers; 1e-3 for the others."""
RESUME_BOUND = 1e-4
"""GPUs add in varying order; on a CPU the difference is 0."""
ON_DEVICE = {
    "generate": f"generate --prompts {{models}}/prompts.jsonl --rollouts {{run}}/rollouts {SAMPLING} "
    "--student {models}/student",
    "generate teacher": f"generate --prompts {{models}}/prompts.jsonl --policy teacher {SAMPLING} "
    "--teacher {models}/teacher --rollouts {run}/teacher",
    "generate speculative": f"generate --prompts {{models}}/prompts.jsonl --policy speculative {SAMPLING} {MODELS} "
    "--rollouts {run}/speculative",
    "train online": f"train --prompts {{models}}/prompts.jsonl --checkpoint {{run}}/online {SAMPLING} {MODELS} "
    f"{TRAINING}",
}
"""Commands whose sampled ids depend on the device; the stage only has to end."""
OUTPUTS = {
    "generate": "rollouts",
    "generate teacher": "teacher",
    "generate speculative": "speculative",
    "train online": "online",
}


@dataclass(frozen=True)
class Case:
    """One comparison of a part of the objective with the reference in float64."""

    part: str
    formula: str
    dtype: torch.dtype
    softcap: float | None

    @property
    def name(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return f"{self.part}: {self.formula}, {kind}{', soft-cap' if self.softcap else ''}"

    def measure(self, device: str) -> Figure:
        """The largest difference, relative to the largest value of its tensor."""
        exact = self.run("reference" if self.part in OBJECTIVES else "comparison", torch.float64, "cpu")
        pairs = zip(exact, self.run(self.part, self.dtype, device), strict=True)
        worst = max(float((a - b.cpu().double()).abs().max() / a.abs().max()) for a, b in pairs)
        return _within(worst, BOUNDS[self.dtype])

    def run(self, part: str, dtype: torch.dtype, device: str) -> list[Tensor]:
        """Loss and gradients of the objective, or the values of each token and their gradient."""
        generator, config = torch.Generator().manual_seed(0), FORMULAS[self.formula]
        mask = torch.ones(3, 40, dtype=torch.bool)
        mask[1, 30:] = mask[2, 7:] = False
        tokens = int(mask.sum())

        def normal(rows: int, columns: int, scale: float) -> Tensor:
            values = torch.randn(rows, columns, generator=generator) * scale
            return values.to(self.dtype).to(dtype).to(device)

        if part in COMPARISONS:
            outputs = (LinearOutputs(normal(tokens, VOCAB, 2.0), softcap=self.softcap) for _ in range(2))
            return COMPARISONS[part](*outputs, config)
        student, teacher = normal(tokens, 48, 1.0), normal(tokens, 64, 1.0)
        heads = Head(normal(VOCAB, 48, 0.3), softcap=self.softcap), Head(normal(VOCAB, 64, 0.25), softcap=self.softcap)
        leaves = [student.requires_grad_(), heads[0].weight.requires_grad_()]
        loss = OBJECTIVES[part](student, heads[0], TeacherHidden(teacher, heads[1]), mask.to(device), config)
        loss.backward()
        return [loss.detach(), *(leaf.grad for leaf in leaves)]


def _reference(student: Tensor, head: Head, teacher: TeacherHidden, mask: Tensor, config: TSDKDConfig) -> Tensor:
    return token_selective_loss(head.logits(student), teacher, mask, config)[0]


def _chunked(*arguments: Any, compiled: bool = False) -> Tensor:
    return token_selective_loss_from_hidden(*arguments, compiled=compiled)[0]


def _comparison(student: LinearOutputs, teacher: LinearOutputs, config: TSDKDConfig) -> list[Tensor]:
    logits, grads = student.logits(), torch.empty_like(student.values)
    values = compare_logits(logits, teacher.logits(), student.softcap_grad(logits), config, None, BlockBuffers(), grads)
    return [*values[:4], grads]


def _kernel(student: LinearOutputs, teacher: LinearOutputs, config: TSDKDConfig) -> list[Tensor]:
    values = compare_by_kernel(student, teacher, config, None)
    return [*values[:4], student.values]


OBJECTIVES: dict[str, Callable[..., Tensor]] = {
    "chunked": _chunked,
    "chunked, compiled": partial(_chunked, compiled=True),
    "reference": _reference,
}
COMPARISONS: dict[str, Callable[..., list[Tensor]]] = {"comparison": _comparison, "kernel": _kernel}


def cases(options: Options) -> list[Case]:
    """With --tiny one divergence, compiled once; without a GPU not the kernel."""
    parts = [*OBJECTIVES, *COMPARISONS]
    if options.device != "cuda":
        parts.remove("kernel")
    made = [Case(*values) for values in product(parts, FORMULAS, BOUNDS, (None, 3.0))]
    if options.tiny:
        return [case for case in made if case.formula == "JSD" and not ("compiled" in case.part and case.softcap)][::2]
    return made


def _within(difference: float, bound: float) -> Figure:
    if not difference <= bound:
        raise ValueError(f"the difference is {difference:.2g}, the bound {bound:g}")
    return {"difference": difference, "bound": bound}


def run_command(line: str, **directories: Path) -> None:
    result = CliRunner().invoke(app, line.format(**directories).split())
    if result.exit_code:
        raise RuntimeError(f"{line}: {result.output[-2000:]}")


def run_comparable(models: Path, run: Path, out: Path) -> None:
    for name, line in COMPARABLE.items():
        if name not in COMPARED_WITH:
            run_command(line, models=models, run=run, out=out)


def output_of(name: str) -> str:
    """Directory of a comparable command's output."""
    return name.replace(" ", "-")


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

    def tsdkd(self, line: str, output: Path) -> None:
        """Run a command in this process, unless its output exists."""
        if not output.exists():
            run_command(line, models=self.models, run=self.run, out=self.here)

    def on_device(self, name: str) -> Figure:
        self.tsdkd(ON_DEVICE[name], self.run / OUTPUTS[name])
        return {"result": "ended"}

    @cached_property
    def reference(self) -> Path:
        """Outputs of the comparable commands on the CPU."""
        self.on_device("generate")
        words = [sys.executable, "-m", "benchmarks.gpu.a_devices", "--on-cpu"]
        finished = subprocess.run(
            [*words, *map(str, (self.models, self.run, self.cpu))],
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
        reference = self.reference / output_of(COMPARED_WITH.get(name, name))
        difference = largest_difference(numbers(reference), numbers(self.here / output_of(name)))
        return _within(difference, STAGE_BOUNDS.get(name, 1e-3))

    def make(self, name: str) -> None:
        self.on_device("generate")
        if name != "score":
            self.make("score")
        self.tsdkd(COMPARABLE[name], self.here / output_of(name))

    def resume(self) -> Figure:
        """A run that is stopped after its first step ends with the weights of one that is not."""
        self.make("train full")
        line = COMPARABLE["train full"].replace("/train-full", "/resumed") + " --save-steps 1"
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
        return _within(
            largest_difference(numbers(self.here / "train-full"), numbers(self.here / "resumed")), RESUME_BOUND
        )

    def evaluate(self) -> Figure:
        """A benchmark of lm-eval and the divergence from the teacher, on the device."""
        self.make("score")
        held_out, results = self.here / "recorded", self.here / "results"
        held_out.mkdir()
        (held_out / "rollouts").symlink_to(self.run / "rollouts")
        (held_out / "scores").symlink_to(self.here / "score")
        run_command(
            "eval --model student={models}/student --tasks embedded --limit 4 --held-out {recorded} "
            "--results {results}",
            models=self.models,
            recorded=held_out,
            results=results,
        )
        accuracy = load_manifest(results / "student").summary["embedded"]["value"]
        return {"result": "ended", "accuracy": accuracy}

    def held_out(self) -> Figure:
        """The divergence from the teacher on the rollouts, on the device and on the CPU."""
        self.make("score")
        source = OfflineSource(self.run / "rollouts", self.here / "score")
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
    columns = ["difference", "bound", "result", "accuracy"]
    figures = open_figures("a_devices", "a. Correctness on the device", columns, options)
    rows: dict[str, Callable[[], Figure]] = {
        case.name: partial(case.measure, options.device) for case in cases(options)
    }
    with TemporaryDirectory() as directory:
        stages = Stages(Path(directory))
        rows |= {name: partial(stages.on_device, name) for name in ON_DEVICE}
        rows |= {name: partial(stages.compare, name) for name in COMPARABLE}
        rows |= {"resume": stages.resume, "eval": stages.evaluate, "held-out divergence": stages.held_out}
        for name, work in rows.items():
            measure(figures, name, work)
    figures.finish(list(rows))


if __name__ == "__main__":
    main()
