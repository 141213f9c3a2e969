"""transformers' Trainer with the token-selective objective.

Departs from the stock Trainer in six places: the loss; its normalisation by the optimizer batch's responses; how
samples are dealt to processes and answered; evaluation on held-out samples; the objective's metrics in every log; and
a mark in each saved checkpoint that says it is whole (`callbacks`).
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from tsdkd.core import (
    AdaptiveOpener,
    Sampled,
    TeacherSignal,
    TSDKDConfig,
    token_selective_loss_from_hidden,
)
from tsdkd.errors import TsdkdError
from tsdkd.stages.data.held_out import HeldOut, measure_held_out
from tsdkd.stages.data.sources import (
    Batch,
    Sample,
    ScoringSnapshot,
    Source,
    collate,
    empty_batch,
    predicting_hidden,
    response_ids,
)
from tsdkd.stages.metrics.health import response_health
from tsdkd.stages.models.distributed import require_supported_strategy, unsharded
from tsdkd.stages.models.load import LanguageModel, hidden_states, output_head
from tsdkd.stages.models.lora import base_with_adapters
from tsdkd.stages.models.tokenizers import vocab_size
from tsdkd.stages.train.batch_order import DistributedOpener, EpochLoader, MicroBatches


class DistillationTrainer(Trainer):
    """Distils what a source's teacher says of its samples."""

    def __init__(
        self,
        student: LanguageModel,
        source: Source,
        learned: Sequence[int],
        held_out: HeldOut | None,
        arguments: TrainingArguments,
        objective: TSDKDConfig,
        compiled: bool = False,
    ) -> None:
        """`learned`: the source's samples that are trained on."""
        self.student = student
        self.source = source
        self.held_out = held_out
        self.objective = objective
        self.compiled = compiled
        self.vocab = vocab_size(student.tokenizer)
        opener = DistributedOpener if arguments.world_size > 1 else AdaptiveOpener
        self.adaptive = opener() if objective.opener == "adaptive" else None
        self._sums: dict[str, Tensor] = defaultdict(lambda: torch.tensor(0.0))
        self._responses: Counter[str] = Counter()
        """That each metric is a mean over: a micro-batch without an opener has no ranks to agree on."""
        self._plain_forward = student.model.forward
        # The loss is part of the forward, where wrappers such as DDP and FSDP expect every use of a weight.
        student.model.forward = partial(self.objective_of, student.model)
        samples: Any = torch.utils.data.Subset(source, learned)  # type: ignore[arg-type]  # a Source is a Dataset
        super().__init__(student.model, arguments, data_collator=list, train_dataset=samples, eval_dataset=held_out)
        require_supported_strategy(
            self.accelerator.distributed_type, getattr(self.accelerator.state, "fsdp_plugin", None)
        )
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = True  # the loss below is already normalised over the optimizer batch

    def objective_of(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        attention_mask: Tensor,
        response_mask: Tensor,
        teacher: TeacherSignal | None,
        memory: ScoringSnapshot | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What the student's forward gives in training: the loss and its metrics."""
        hidden = hidden_states(model, input_ids, attention_mask)
        output = model.get_output_embeddings()
        called = output(hidden[:, :0]).sum()  # 0: what FSDP shards is whole once it was called, in every process alike
        if teacher is None:  # every weight takes part, with gradient 0
            if self.adaptive:
                self.adaptive.choose([])
            return 0 * hidden.sum() + called, {}
        hidden, head = predicting_hidden(hidden, response_mask), output_head(model, self.vocab)
        ids, then = response_ids(input_ids, response_mask), memory.log_probs if memory else None
        loss, metrics = token_selective_loss_from_hidden(
            hidden,
            head,
            teacher,
            response_mask,
            self.objective,
            self.adaptive.fraction if self.adaptive else None,
            compiled=self.compiled,
            sampled=Sampled(ids, self.source.teacher_fraction, then),
        )
        if isinstance(output, FSDPModule):
            loss = loss + called
        return loss, metrics | (memory.compare(hidden, head) if memory else {})

    @contextmanager
    def inference_student(self) -> Iterator[LanguageModel]:
        """The student as it is now, as a model that answers, in the precision it is trained in."""
        model = base_with_adapters(self.student.model)
        training, objective = self.student.model.training, self.student.model.forward
        self.student.model.forward = self._plain_forward
        self.student.model.eval()
        try:
            with torch.no_grad(), self.accelerator.autocast():
                yield replace(self.student, model=model)
        finally:
            self.student.model.forward = objective
            self.student.model.train(training)

    def get_train_dataloader(self) -> EpochLoader:
        args = self.args
        mine = MicroBatches(
            len(self.train_dataset), args.train_batch_size, args.seed, args.process_index, args.world_size
        )
        return EpochLoader(self.train_dataset, batch_sampler=mine, collate_fn=self.data_collator)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The micro-batches of one optimizer step, answered, and how many responses all processes have."""
        micro, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        with self.inference_student() as student:
            key, progress = (self.args.seed, self.state.global_step), self.state.global_step / self.state.max_steps
            asked = [sample for batch in micro for sample in batch]
            answered = iter(self.source.with_responses(asked, student, key, progress))
        batches = [self._batch([next(answered) for _ in batch]) for batch in micro]
        responses = torch.tensor(sum(map(len, micro)), device=device)
        return batches, self.accelerator.reduce(responses, reduction="sum")

    def _batch(self, samples: list[Sample]) -> Batch:
        if not samples:  # another process has the last ones; this one reads along
            return empty_batch() | {"samples": []}
        known = [{name: s[name] for name in ("sample_id", "response_ids", "finish_reason")} for s in samples]
        return collate(samples, self.source) | {"samples": known}

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        samples = inputs.pop("samples")
        # As objects of ours: wrappers round the tensors among a forward's arguments to their own precision.
        teacher, memory = (
            (self.source.signal(inputs), self.source.scoring_snapshot(inputs)) if samples else (None, None)
        )
        del inputs["recorded"]
        loss, metrics = model(**inputs, teacher=teacher, memory=memory)
        if not torch.isfinite(loss):
            self._refuse(loss, metrics, samples)
        responses = len(samples)
        for name, value in (metrics | response_health(samples) if samples else {}).items():
            self._responses[name] += responses
            self._sums[name] = responses * value + self._sums[name].to(getattr(value, "device", "cpu"))
        return loss * responses / num_items_in_batch * self.accelerator.num_processes

    def _refuse(self, loss: Tensor, metrics: dict[str, Tensor], samples: list[Sample]) -> None:
        broken = [
            name
            for name in ("indirect", "direct", "entropy", "policy_gradient")
            if not metrics.get(name, loss.new_zeros(())).isfinite()
        ]
        raise TsdkdError(
            f"The loss is {loss.item()} at step {self.state.global_step + 1} ({', '.join(broken) or 'sum'}), "
            f"samples {', '.join(sample['sample_id'] for sample in samples)}.",
            "Lower --learning-rate, or look at these samples; the last saved step is kept.",
        )

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Closeness to the teacher on the held-out samples."""
        assert self.held_out is not None
        with self.inference_student() as inference:
            student = unsharded(inference)
            head = output_head(student.model, self.vocab)
            processes = {"rank": self.args.process_index, "world_size": self.args.world_size}
            found = measure_held_out(student, head, self.held_out, **processes)
        metrics = {f"eval_{name}": found[name] for name in ("kl", "agreement", "entropy")}
        self.log(metrics)
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Saved steps keep the running model's names: those of the hub (unfused experts, say) are not read back."""
        as_they_are = {} if hasattr(self.model, "peft_config") else {"save_original_format": False}
        with patch.object(self.model, "save_pretrained", partial(self.model.save_pretrained, **as_they_are)):
            super()._save(output_dir, state_dict)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        known = set(getattr(self.model, "all_tied_weights_keys", None) or ())
        if lost := set(load_result.missing_keys) - known:
            raise TsdkdError(f"A saved step lacks {len(lost)} weights, such as {min(lost)}.", "Run with --overwrite.")
        super()._issue_warnings_after_load(load_result)

    def go_back_to(self, checkpoint: Path) -> None:
        """Take weights and log of a saved step."""
        self._load_from_checkpoint(str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))

    @property
    def log_entries(self) -> list[dict[str, float]]:
        """Records of optimizer steps and evaluations; "epoch" is left out, since it counts micro-batches."""
        entries = [entry for entry in self.state.log_history if "loss" in entry or "eval_kl" in entry]
        return [{name: value for name, value in entry.items() if name != "epoch"} for entry in entries]

    @property
    def logged_steps(self) -> list[dict[str, float]]:
        return [entry for entry in self.log_entries if "loss" in entry]

    @property
    def logged_evaluations(self) -> list[dict[str, float]]:
        return [entry for entry in self.log_entries if "eval_kl" in entry]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if not math.isfinite(logs.get("grad_norm", 0.0)):  # logged before anything of this step is saved
            raise TsdkdError(
                f"The gradient is not finite at step {self.state.global_step}.",
                "Lower --learning-rate or --max-grad-norm; nothing of this step was saved.",
            )
        if "loss" in logs:
            own = {name: (float(total), self._responses[name]) for name, total in self._sums.items()}
            parts = gather_object([own]) if self.args.world_size > 1 else [own]
            for name in {name: None for part in parts for name in part}:
                totals, counts = zip(*(part.get(name, (0.0, 0)) for part in parts), strict=True)
                logs[name] = sum(totals) / sum(counts)
            self._sums.clear()
            self._responses.clear()
        super().log(logs, start_time)
