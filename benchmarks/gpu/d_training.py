"""d. An offline training step at the paper's size: 128 prompts and responses of 512 tokens each, Qwen2.5 1.5B shapes.

    python benchmarks/gpu/d_training.py [--out DIR] [--seconds 240] [--tiny]

Random weights; the teacher is present as hidden states of width 5,120 and its head. float32 weights under bfloat16
autocast, AdamW, micro-batches of 8 with gradient checkpointing. "floor": the student's forward and backward from a
random gradient at its logits, and the product with the teacher's head. Rows are for a step of 16 micro-batches.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.common import Figure, Figures, Options, interleaved_seconds, parse_options, peak_above, seconds_of
from benchmarks.gpu.models import random_model
from tsdkd.core import Head, TeacherHidden, TSDKDConfig, token_selective_loss_from_hidden
from tsdkd.stages.config.train import LoRAConfig
from tsdkd.stages.data.source import predicting_hidden
from tsdkd.stages.models.load import LanguageModel, hidden_states, output_head
from tsdkd.stages.models.new_adapters import add_lora, base_with_adapters

EXPECTED = ("full", "full, compiled", "LoRA", "AdamW step")


class Step:
    """One micro-batch of a student, with the teacher's hidden states of its response tokens."""

    def __init__(self, student: LanguageModel, options: Options) -> None:
        self.options = options
        self.responses, self.length, teacher_width = (2, 8, 48) if options.tiny else (8, 512, 5120)
        self.micro_batches = 1 if options.tiny else 16
        self.model: Any = student.model.train()
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.vocab = student.head.vocab
        shape, device = (self.responses, 2 * self.length), options.device
        generator = torch.Generator(device).manual_seed(0)
        self.ids = torch.randint(0, self.vocab, shape, device=device, generator=generator)
        self.mask = torch.ones(self.responses, self.length, dtype=torch.bool, device=device)
        tokens = self.responses * self.length

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, device=device, generator=generator).to(torch.bfloat16)

        self.teacher = TeacherHidden(
            normal(tokens, teacher_width), Head(normal(self.vocab, teacher_width) * teacher_width**-0.5)
        )

    def hidden(self) -> Tensor:
        """(tokens, width), with the graph of the student's forward."""
        model = base_with_adapters(self.model)
        with torch.autocast(self.options.device, torch.bfloat16):
            hidden = hidden_states(model, self.ids, torch.ones_like(self.ids))
        return predicting_hidden(hidden, self.mask)

    def run(self, *, compiled: bool = False) -> None:
        """Forward, objective, backward."""
        hidden = self.hidden()
        head = output_head(base_with_adapters(self.model), self.vocab)
        with torch.autocast(self.options.device, torch.bfloat16):
            loss, _ = token_selective_loss_from_hidden(
                hidden, head, self.teacher, self.mask, TSDKDConfig(), compiled=compiled
            )
        loss.backward()

    def floor(self) -> None:
        """The student's forward and backward with its head, and the teacher's head product."""
        hidden = self.hidden()
        leaf = hidden.detach().requires_grad_()
        weight = base_with_adapters(self.model).get_output_embeddings().weight
        for rows, teacher in zip(leaf.split(512), self.teacher.hidden.split(512), strict=True):
            with torch.autocast(self.options.device, torch.bfloat16):
                logits = rows @ weight[: self.vocab].T
                with torch.no_grad():
                    target = teacher @ self.teacher.head.weight.T
            logits.backward(target.to(logits.dtype))
        hidden.backward(leaf.grad)

    def measure(self, work: Callable[[], None]) -> Figure:
        repeats = 1 if self.options.tiny else 3
        times = interleaved_seconds({"step": work, "floor": self.floor}, repeats, self.options.device)
        step, floor = min(times["step"]), min(times["floor"])
        self.model.zero_grad(set_to_none=True)
        return {
            "seconds a step": self.micro_batches * step,
            "floor": self.micro_batches * floor,
            "times floor": step / floor,
            "forward": self.micro_batches * seconds_of(self.hidden, self.options.device),
            "tokens/s": 2 * self.responses * self.length / step,
            "peak GB above": peak_above(work, self.options.device),
        }


def optimizer_step(step: Step) -> Figure:
    """Clipping and AdamW, once a step."""
    parameters = [p for p in step.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-6)
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 1e-4)

    def work() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    work()
    return {"seconds a step": seconds_of(work, step.options.device)}


def main() -> None:
    options = parse_options(__doc__)
    figures = Figures("d_training", options)
    full = Step(random_model("1.5B", options, torch.float32), options)
    figures.measure("full", partial(full.measure, full.run))
    figures.measure("full, compiled", partial(full.measure, partial(full.run, compiled=True)))
    figures.measure("AdamW step", partial(optimizer_step, full))
    del full
    student = add_lora(random_model("1.5B", options), LoRAConfig(), seed=0)
    lora = Step(student, options)
    figures.measure("LoRA", partial(lora.measure, lora.run))
    columns = ["seconds a step", "floor", "times floor", "forward", "tokens/s", "peak GB above"]
    figures.finish("a training step of 128 responses of 512 + 512 tokens", columns, EXPECTED)


if __name__ == "__main__":
    main()
