"""g. Optimizers, and LoRA on quantised weights: time, memory planned beside measured, and the trained weights.

    python -m benchmarks.gpu.g_optimizers [--out DIR] [--seconds 200] [--tiny]

`train`'s own Trainer takes 5 steps of 16 prompts and responses of 512 tokens each at the shape of Qwen2.5 1.5B, with
random weights and the teacher's recorded hidden states of d_training: micro-batches of 8, gradient checkpointing, a
bfloat16 forward. Full training has float32 weights and the learning rate 5e-6; LoRA has 1e-4 and adapters on weights of
16, 8 and 4 bits, which tsdkd loads from a directory. Paged optimizers have a row on a GPU only.

"seconds a step" is the median of all steps but the first. "peak GB" is the memory of torch in use at most, with the
models; "planned GB" is the total that `tsdkd plan` states. Neither counts paged states. "optimizer GB" are the bytes of
the states, "planned states" those of the plan. "loss" is that of the first micro-batch after the last step, "loss
before" the same before the first. "distance" is that of the update by all steps from the update of the first row, of
full training or of LoRA, in lengths of the latter.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor

from benchmarks.gpu.device import measure, open_figures, parse_options, peak_of
from benchmarks.gpu.figures import Figure, Options
from benchmarks.gpu.models import random_model, shape
from benchmarks.gpu.training import RandomSource, StepClock
from tsdkd.stages.config.optimizer import OPTIMIZERS
from tsdkd.stages.config.train import LoRAConfig, TrainConfig
from tsdkd.stages.data.source import collate
from tsdkd.stages.models.device import free_memory
from tsdkd.stages.models.language_model import LanguageModel
from tsdkd.stages.models.load import load_model
from tsdkd.stages.models.memory import estimate_training_memory
from tsdkd.stages.models.new_adapters import add_lora
from tsdkd.stages.train.settings import reset_overrides, training_arguments
from tsdkd.stages.train.trainer import DistillationTrainer

STEPS = 5
CONFIG = TrainConfig(
    epochs=1,
    batch_size=16,
    micro_batch_size=8,
    warmup_ratio=0,
    schedule="constant_with_warmup",
    precision="bfloat16",
    gradient_checkpointing=True,
)
LORA = replace(CONFIG, learning_rate=1e-4, lora=LoRAConfig())
FULL_ROWS = {
    name: replace(CONFIG, optimizer=name) for name in sorted(OPTIMIZERS, key=lambda name: name != "adamw_torch")
}
LORA_ROWS = {
    "LoRA, bfloat16": LORA,
    "LoRA, 8bit": replace(LORA, lora=LoRAConfig(quantize="8bit")),
    "LoRA, 4bit": replace(LORA, lora=LoRAConfig(quantize="4bit")),
}
REFERENCES = {False: next(iter(FULL_ROWS)), True: next(iter(LORA_ROWS))}
"""The row that others are compared with, by whether adapters are trained."""
COLUMNS = [
    "seconds a step",
    "peak GB",
    "planned GB",
    "optimizer GB",
    "planned states",
    "loss before",
    "loss",
    "distance",
]


class Runs:
    """Runs of all rows, each from the same weights; the updates of the references are kept on the CPU."""

    def __init__(self, options: Options, directory: str) -> None:
        self.options, self.directory = options, Path(directory)
        self.updates: dict[str, dict[str, Tensor]] = {}

    @cached_property
    def saved_model(self) -> Path:
        """The model in bfloat16, as `tsdkd train` loads it."""
        path = self.directory / "student"
        student = random_model("1.5B", self.options)
        student.model.save_pretrained(path)
        student.tokenizer.save_pretrained(path)
        return path

    def measure(self, name: str, config: TrainConfig) -> Figure:
        reference = REFERENCES[config.lora is not None]
        if name != reference and reference not in self.updates:  # a new process continues
            self.train(reference, (FULL_ROWS | LORA_ROWS)[reference])
            free_memory()
        return self.train(name, config)

    def train(self, name: str, config: TrainConfig) -> Figure:
        if self.options.tiny:
            config = replace(config, batch_size=4, micro_batch_size=2)
        steps = 2 if self.options.tiny else STEPS
        student = self.student(config)
        source = RandomSource(self.options, student.vocab, steps * config.batch_size, mixed=False)
        longest = max(map(source.length, range(len(source))))
        teachers = [shape("14B", self.options)]
        planned = estimate_training_memory(student.model.config, teachers, longest, config, "bfloat16")
        student = add_lora(student, config.lora, seed=0) if config.lora else student
        arguments = training_arguments(config, "bfloat16", 0, self.directory / "steps")
        arguments.save_strategy = "no"
        start = trained_weights(student)
        with reset_overrides(config.optimizer):
            trainer = DistillationTrainer(student, source, range(len(source)), None, arguments, config.objective)
            loss_before, clock = loss_of(trainer), StepClock(self.options.device)
            trainer.add_callback(clock)
            peak = peak_of(trainer.train, self.options.device)
        reference = REFERENCES[config.lora is not None]
        if name == reference:
            self.updates[name] = {key: value - start[key] for key, value in trained_weights(student).items()}
        return {
            "seconds a step": median(clock.steps[1:]),
            "peak GB": peak,
            "planned GB": planned.total / 1e9,
            "optimizer GB": state_bytes_of(trainer.optimizer) / 1e9,
            "planned states": planned.optimizer / 1e9,
            "loss before": loss_before,
            "loss": loss_of(trainer),
            "distance": distance(student, start, self.updates[reference]),
        }

    def student(self, config: TrainConfig) -> LanguageModel:
        if config.lora:
            return load_model(str(self.saved_model), "bfloat16", quantize=config.quantize)
        return random_model("1.5B", self.options, torch.float32)


def trained_parameters(student: LanguageModel) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in student.model.named_parameters() if value.requires_grad}


def trained_weights(student: LanguageModel) -> dict[str, Tensor]:
    """Copies of tensors on the CPU."""
    return {name: value.to("cpu", copy=True) for name, value in trained_parameters(student).items()}


def distance(student: LanguageModel, start: Mapping[str, Tensor], update: Mapping[str, Tensor]) -> float:
    """The distance between `update` and the student's update since `start`, divided by the norm of `update`."""
    squares, length = 0.0, 0.0
    for name, value in trained_parameters(student).items():
        expected = update[name].to(value.device)
        squares += float((value - start[name].to(value.device) - expected).square().sum())
        length += float(expected.square().sum())
    return (squares / length) ** 0.5


def loss_of(trainer: DistillationTrainer) -> float:
    """The loss of the first micro-batch."""
    samples = next(iter(trainer.get_train_dataloader()))
    batch = send_to_device(collate(samples, trainer.source), trainer.args.device) | {"samples": samples}
    with torch.no_grad(), trainer.accelerator.autocast():
        loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=len(samples))
    return float(loss)


def state_bytes_of(optimizer: Any) -> int:
    """Bytes of an optimizer's states. bitsandbytes' tables of 256 codes belong to no weight."""
    states = [state for parameter in optimizer.optimizer.state.values() for state in parameter.items()]
    return sum(value.nbytes for name, value in states if torch.is_tensor(value) and not name.startswith("qmap"))


def main() -> None:
    options = parse_options(__doc__)
    figures = open_figures("g_optimizers", "g. Optimizers and quantised weights, Qwen2.5 1.5B shapes", COLUMNS, options)
    rows = {
        name: config
        for name, config in (FULL_ROWS | LORA_ROWS).items()
        if options.device == "cuda" or not OPTIMIZERS[config.optimizer].paged
    }
    with TemporaryDirectory() as directory:
        runs = Runs(options, directory)
        for name, config in rows.items():
            measure(figures, name, partial(runs.measure, name, config))
    figures.finish(list(rows))


if __name__ == "__main__":
    main()
