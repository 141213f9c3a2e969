"""transformers' Trainer with the token-selective objective on staged samples.

Departs from the stock Trainer in five places: the loss; its normalisation by the optimizer batch's responses; how
samples are dealt to processes; the objective's metrics in every log; and a mark in each saved checkpoint that says it
is whole.
"""

import json
import math
import shutil
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from tsdkd.core import AdaptiveOpener, TeacherHidden, TeacherSignal, TSDKDConfig, token_selective_loss_from_hidden
from tsdkd.errors import TsdkdError
from tsdkd.stages.batches import align
from tsdkd.stages.models import LanguageModel, head_of, hidden_of
from tsdkd.stages.report import Reporter
from tsdkd.stages.sharing import Loader, MicroBatches, SharedOpener
from tsdkd.stages.staged import Sample, StagedSamples

SAVED = "tsdkd_state.json"
"""Written last into each of the Trainer's checkpoints: one without it was cut off."""


class StagedTrainer(Trainer):
    """Distils from recorded scores."""

    def __init__(
        self,
        student: LanguageModel,
        samples: StagedSamples,
        arguments: TrainingArguments,
        objective: TSDKDConfig,
        compiled: bool = False,
    ) -> None:
        self.decoder = samples.decoder.to(arguments.device)
        self.objective = objective
        self.compiled = compiled
        self.vocab = student.head.vocab_size
        opener = SharedOpener if arguments.world_size > 1 else AdaptiveOpener
        self.adaptive = opener() if objective.opener == "adaptive" else None
        self._sums: dict[str, Tensor] = defaultdict(lambda: torch.tensor(0.0))
        self._responses = 0
        # The loss is part of the forward, where wrappers such as DDP and FSDP expect every use of a weight.
        student.model.forward = partial(self.objective_of, student.model)
        super().__init__(student.model, arguments, data_collator=self.collate, train_dataset=samples)
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = True  # the loss below is already normalised over the optimizer batch

    def collate(self, samples: list[Sample]) -> dict[str, Any]:
        if not samples:  # another process has the last ones; this one reads along
            one = torch.ones(1, 1, dtype=torch.long)
            nothing = {"response_mask": one[:0].bool(), "scores": {}, "sample_ids": []}
            return {"input_ids": 0 * one, "attention_mask": one, **nothing}
        ids, attention, mask = align([s["prompt_ids"] for s in samples], [s["response_ids"] for s in samples])
        return {
            "input_ids": ids,
            "attention_mask": attention,
            "response_mask": mask,
            "scores": self.decoder.tensors(samples),
            "sample_ids": [s["sample_id"] for s in samples],
        }

    def objective_of(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        attention_mask: Tensor,
        response_mask: Tensor,
        teacher: TeacherSignal | TeacherHidden | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What the student's forward gives in training: the loss and its metrics."""
        hidden = hidden_of(model, input_ids, attention_mask)
        if teacher is None:  # every weight takes part, with gradient 0
            if self.adaptive:
                self.adaptive.choose([])
            return 0 * model.get_output_embeddings()(hidden).sum(), {}
        predicting = hidden[:, -response_mask.shape[1] - 1 : -1]
        return token_selective_loss_from_hidden(
            predicting[response_mask],
            head_of(model, self.vocab),
            teacher,
            response_mask,
            self.objective,
            self.adaptive.fraction if self.adaptive else None,
            compiled=self.compiled,
        )

    def get_train_dataloader(self) -> Loader:
        args = self.args
        mine = MicroBatches(
            len(self.train_dataset), args.train_batch_size, args.seed, args.process_index, args.world_size
        )
        return Loader(self.train_dataset, batch_sampler=mine, collate_fn=self.data_collator)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The micro-batches of one optimizer step, and how many responses they hold over all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        responses = torch.tensor(sum(len(batch["response_mask"]) for batch in batches), device=device)
        return batches, self.accelerator.reduce(responses, reduction="sum")

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        sample_ids = inputs.pop("sample_ids")
        # As an object of ours: wrappers round the tensors among a forward's arguments to their own precision.
        scores = inputs.pop("scores")
        teacher = self.decoder.decode(scores) if sample_ids else None
        loss, metrics = model(**inputs, teacher=teacher)
        if not torch.isfinite(loss):
            samples = ", ".join(sample_ids)
            raise TsdkdError(
                f"The loss is {loss.item()} at step {self.state.global_step + 1}, samples {samples}.",
                "Lower --learning-rate, or look at these samples; the last saved step is kept.",
            )
        responses = len(sample_ids)
        self._responses += responses
        for name, value in metrics.items():
            self._sums[name] = self._sums[name].to(value.device) + responses * value
        return loss * responses / num_items_in_batch * self.accelerator.num_processes

    @property
    def logged_steps(self) -> list[dict[str, float]]:
        """One record per optimizer step; "epoch" is left out, since it counts micro-batches."""
        steps = [entry for entry in self.state.log_history if "loss" in entry]
        return [{name: value for name, value in step.items() if name != "epoch"} for step in steps]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if not math.isfinite(logs.get("grad_norm", 0.0)):  # logged before anything of this step is saved
            raise TsdkdError(
                f"The gradient is not finite at step {self.state.global_step}.",
                "Lower --learning-rate or --max-grad-norm; nothing of this step was saved.",
            )
        if "loss" in logs:
            own = self._responses, {name: float(total) for name, total in self._sums.items()}
            parts = gather_object([own]) if self.args.world_size > 1 else [own]
            responses = sum(count for count, _ in parts)
            for name in {name: None for _, sums in parts for name in sums}:
                logs[name] = sum(sums.get(name, 0.0) for _, sums in parts) / responses
            self._sums.clear()
            self._responses = 0
        super().log(logs, start_time)


class MarkWhole(TrainerCallback):
    """Ends every save with `SAVED`, which also carries the adaptive opener's window."""

    def __init__(self, adaptive: AdaptiveOpener | None) -> None:
        self.adaptive = adaptive

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            content = self.adaptive.state_dict() if self.adaptive else {}
            (Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / SAVED).write_text(json.dumps(content))


class ShowProgress(TrainerCallback):
    """Optimizer steps, on a bar that `stack` closes."""

    def __init__(self, reporter: Reporter, stack: ExitStack) -> None:
        self.reporter = reporter
        self.stack = stack

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        bar = self.reporter.progress("student learns", state.max_steps, "steps", state.global_step)
        self.advance = self.stack.enter_context(bar)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.advance(1)


class StopWhenAsked(TrainerCallback):
    """Saves and stops at the end of the step during which `requested` was set, in any process."""

    requested = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if args.world_size > 1:
            self.requested = any(gather_object([self.requested]))
        if self.requested:
            control.should_save = control.should_training_stop = True


def last_whole_checkpoint(directory: Path) -> Path | None:
    """The newest saved step; those that were cut off are removed."""
    whole = []
    for checkpoint in sorted(directory.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1])):
        if (checkpoint / SAVED).is_file():
            whole.append(checkpoint)
        else:
            shutil.rmtree(checkpoint, ignore_errors=True)  # another process may be faster
    return whole[-1] if whole else None
