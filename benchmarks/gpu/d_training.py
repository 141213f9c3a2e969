"""d. An offline training step at the paper's size: 128 prompts and responses of 512 tokens each, Qwen2.5 1.5B shapes.

    python -m benchmarks.gpu.d_training [--out DIR] [--seconds 200] [--tiny]

Random weights, and a teacher as recorded hidden states of width 5,120 with its head. `train`'s own Trainer takes the
steps: float32 weights under bfloat16 autocast (LoRA: bfloat16 weights), AdamW, micro-batches of 8, gradient
checkpointing. "mixed lengths": prompts and responses of 64 to 512 tokens.

"step" is a whole optimizer step, from samples in memory to updated weights. Its parts are measured in another step that
waits for the device at each border; "other" is collating, copying to the device, clipping, AdamW and logging. "floor":
the student's forward and backward from a given gradient at its logits, and the product with the teacher's head.
"times floor" compares forward, objective and backward of micro-batches with it, in rounds.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import fields
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate.utils import send_to_device

from benchmarks.gpu.device import (
    interleaved_seconds,
    measure,
    open_figures,
    parse_options,
    peak_above,
    peak_flops,
    seconds_of,
)
from benchmarks.gpu.figures import Figure, Options, Target
from benchmarks.gpu.models import random_model
from benchmarks.gpu.training import RandomSource, StepClock
from tsdkd.core import Head
from tsdkd.stages.config.train import LoRAConfig, TrainConfig
from tsdkd.stages.data.batches import Batch
from tsdkd.stages.models.attributes import replaced_attribute
from tsdkd.stages.models.language_model import hidden_states
from tsdkd.stages.models.model_size import model_size
from tsdkd.stages.models.new_adapters import add_lora
from tsdkd.stages.train import trainer as trainer_module
from tsdkd.stages.train.settings import training_arguments
from tsdkd.stages.train.trainer import DistillationTrainer

SETTINGS: dict[str, dict[str, Any]] = {
    "full, compiled": {"compile": True},
    "LoRA, compiled": {"compile": True, "lora": LoRAConfig()},
    "full, compiled, mixed lengths, padded": {"compile": True},
    "full, compiled, mixed lengths, packed": {"compile": True, "micro_batch_tokens": 8192},
    "full": {},
}
"""Options of `train`. A setting with an option that `train` does not have yet is left out."""
ROWS = [name for name, options in SETTINGS.items() if options.keys() <= {field.name for field in fields(TrainConfig)}]
STEPS = 3
"""Whole steps: the first one warms up, the last one is measured in parts."""
COMPARED_MICRO_BATCHES = 4
PARTS = ("forward", "objective", "backward", "other")
COLUMNS = [
    "seconds a step",
    "tokens/s",
    "share of peak",
    *PARTS,
    "times floor",
    "seconds of the floor",
    "peak GB above",
]
TARGETS = [Target(f"{name}, in floors", lambda f, name=name: f[name]["times floor"], 1.05) for name in ROWS]
FLOOR_TOKENS = 4096
"""Tokens whose logits the floor forms at a time."""


class Clock(StepClock):
    """In the last step it also measures the seconds of the parts that `timed` wraps."""

    def __init__(self, device: str) -> None:
        super().__init__(device)
        self.parts = dict.fromkeys(PARTS[:-1], 0.0)

    def timed(self, part: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if len(self.marks) < STEPS:
                return work(*arguments, **named)
            results: list[Any] = []
            self.parts[part] += seconds_of(lambda: results.append(work(*arguments, **named)), self.device)
            return results[0]

        return call


class Run:
    """A run of training under one setting."""

    def __init__(self, name: str, options: Options, directory: str) -> None:
        self.options = options
        self.packed = "micro_batch_tokens" in SETTINGS[name]
        size = {"batch_size": 4, "micro_batch_size": None if self.packed else 2} if options.tiny else {}
        self.config = TrainConfig(epochs=1, precision="bfloat16", gradient_checkpointing=True, **size, **SETTINGS[name])
        lora = self.config.lora
        student = random_model("1.5B", options, torch.bfloat16 if lora else torch.float32)
        self.size = model_size(student.model.config)
        self.source = RandomSource(options, student.vocab, STEPS * self.config.batch_size, mixed="mixed" in name)
        student = add_lora(student, lora, seed=0) if lora else student
        arguments = training_arguments(self.config, "bfloat16", 0, Path(directory))
        arguments.save_strategy = "no"
        samples = range(len(self.source))
        self.trainer = DistillationTrainer(
            student,
            self.source,
            samples,
            None,
            arguments,
            self.config.objective,
            self.config.compile,
            self.config.micro_batch_tokens,
        )

    def measure(self) -> Figure:
        clock = Clock(self.options.device)
        peak = peak_above(partial(self.train, clock), self.options.device)
        step, last = clock.steps[-2:]
        tokens = sum(map(self.source.length, range(len(self.source)))) / STEPS
        return {
            "seconds a step": step,
            "tokens/s": tokens / step,
            "share of peak": self.flops() / step / peak_flops(self.options),
            **clock.parts,
            "other": last - sum(clock.parts.values()),
            **self.compare_with_floor(),
            "peak GB above": peak,
        }

    def train(self, clock: Clock) -> None:
        """All steps."""
        names = {"forward": "hidden_states", "objective": "token_selective_loss_from_hidden"}
        wrapped: dict[str, tuple[Any, str]] = {part: (trainer_module, name) for part, name in names.items()}
        wrapped["backward"] = (self.trainer.accelerator, "backward")
        self.trainer.add_callback(clock)
        with ExitStack() as stack:
            for part, (owner, name) in wrapped.items():
                stack.enter_context(replaced_attribute(owner, name, clock.timed(part, getattr(owner, name))))
            self.trainer.train()

    def flops(self) -> float:
        """Of one step; the second forward of gradient checkpointing is not counted."""
        responses = sum(len(sample["response_ids"]) for sample in self.source.samples)
        tokens = sum(map(self.source.length, range(len(self.source))))
        vocab, width = self.size.head_shape
        body = self.size.matmul_parameters - vocab * width
        passes = 4 if self.config.lora else 6  # LoRA: no gradients of the weights
        return (
            passes * (body * tokens + vocab * width * responses) + 2 * self.source.head.weight.numel() * responses
        ) / STEPS

    def compare_with_floor(self) -> Figure:
        """Forward, objective and backward of some micro-batches, in rounds with their floor."""
        loader, device = iter(self.trainer.get_train_dataloader()), self.trainer.args.device
        count = 1 if self.packed else COMPARED_MICRO_BATCHES
        entries, responses = self.trainer.get_batch_samples(loader, count, device)
        step_batches = entries[0]["micro_batches"] if self.packed else entries
        compared = range(min(len(step_batches), COMPARED_MICRO_BATCHES))
        batches = [send_to_device(step_batches[i], device) for i in compared]

        def step() -> None:
            for batch in batches:
                self.trainer.training_step(self.trainer.model_wrapped, dict(batch), responses)

        def floor() -> None:
            for batch in batches:
                self.run_floor(batch)

        repeats = 1 if self.options.tiny else 3
        times = interleaved_seconds({"step": step, "floor": floor}, repeats, self.options.device)
        whole_step = len(step_batches) if self.packed else self.trainer.args.gradient_accumulation_steps
        micro_batches = whole_step / len(batches)
        return {
            "times floor": median(step / floor for step, floor in zip(times["step"], times["floor"], strict=True)),
            "seconds of the floor": median(times["floor"]) * micro_batches,
        }

    def run_floor(self, batch: Batch) -> None:
        """The student's forward and backward with its head, and the product with the teacher's head."""
        model = self.trainer.student.model
        with torch.autocast(self.options.device, torch.bfloat16):
            hidden = hidden_states(model, batch["input_ids"], batch["attention_mask"], batch["position_ids"])
        hidden = hidden[batch["predicting"]]
        leaf, recorded = hidden.detach().requires_grad_(), batch["recorded"]["hidden"]
        weight = Head(model.get_output_embeddings().weight, vocab_size=self.trainer.vocab).aligned.weight
        for student, teacher in zip(leaf.split(FLOOR_TOKENS), recorded.split(FLOOR_TOKENS), strict=True):
            with torch.autocast(self.options.device, torch.bfloat16):
                logits = student @ weight.T
                with torch.no_grad():
                    grad = teacher @ self.source.head.weight.T
            logits.backward(grad.to(logits.dtype))
        hidden.backward(leaf.grad)


def measure_setting(name: str, options: Options) -> Figure:
    with TemporaryDirectory() as directory:
        return Run(name, options, directory).measure()


def main() -> None:
    options = parse_options(__doc__)
    title = "d. A training step of 128 responses, offline, Qwen2.5 1.5B shapes"
    figures = open_figures("d_training", title, COLUMNS, options, TARGETS)
    for name in ROWS:
        measure(figures, name, partial(measure_setting, name, options))
    figures.finish(ROWS)


if __name__ == "__main__":
    main()
