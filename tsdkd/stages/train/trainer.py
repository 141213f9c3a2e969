"""transformers' Trainer with the token-selective objective.

It differs from Trainer in the loss, which is averaged over the responses of the whole optimizer batch; in the order of
the samples and their responses; in evaluation on held-out samples; and in the metrics that every log entry carries.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, PrinterCallback, TrainingArguments

from tsdkd.core import (
    AdaptiveOpener,
    ResponseContext,
    SampledTokens,
    TeacherSignal,
    TSDKDConfig,
    Weighted,
    token_selective_loss_from_hidden,
)
from tsdkd.core.config import TERMS
from tsdkd.core.features import NO_CONTEXT
from tsdkd.errors import TsdkdError
from tsdkd.stages.data.batches import Batch, predicted_ids
from tsdkd.stages.data.held_out import HeldOut, measure_held_out
from tsdkd.stages.data.rollout_ahead import AheadSource
from tsdkd.stages.data.source import (
    Sample,
    SamplingSnapshot,
    ScoringSnapshot,
    Source,
    collate,
    empty_batch,
    sample_length,
    sample_turns,
    turns_of_samples,
)
from tsdkd.stages.metrics.grad_shares import pop_grad_shares, square_grad_norms
from tsdkd.stages.metrics.health import response_health
from tsdkd.stages.metrics.log import TIMES, is_step
from tsdkd.stages.metrics.names import teacher_metric
from tsdkd.stages.metrics.step_means import StepMeans
from tsdkd.stages.metrics.step_times import StepTimes, timed
from tsdkd.stages.models.adaptable import base_with_adapters
from tsdkd.stages.models.attributes import replaced_attribute
from tsdkd.stages.models.distributed import require_supported_strategy, unsharded
from tsdkd.stages.models.load import LanguageModel, decoder_of, hidden_states, output_head
from tsdkd.stages.models.packed_attention import training_attention
from tsdkd.stages.train.batch_order import (
    DistributedOpener,
    EpochLoader,
    LazyBatches,
    MicroBatches,
    grouped,
    pack_samples,
)
from tsdkd.stages.train.saved_steps import StepSavingTrainer
from tsdkd.stages.train.selection import StepSelection


class DistillationTrainer(StepSavingTrainer):
    """Trains a student on a source's samples towards the source's teacher."""

    def __init__(
        self,
        student: LanguageModel,
        source: Source,
        indices: Sequence[int],
        held_out: HeldOut | None,
        arguments: TrainingArguments,
        objective: TSDKDConfig,
        compiled: bool = False,
        packed_tokens: int | None = None,
        selection: StepSelection | None = None,
    ) -> None:
        """`indices`: the source's samples that are trained on. Raises InputError for an unsupported strategy.

        `packed_tokens`: the most tokens of a packed micro-batch; None: micro-batches are padded. `selection`: that of a
        method with its own losses, in place of the objective.
        """
        self.student = student
        self.source = source
        self.held_out = held_out
        self.selection = selection
        self.objective = selection.objective if selection else objective
        self.terms = tuple(selection.objective.losses) if selection else tuple(TERMS)
        self.compiled = compiled
        self.packed_tokens = packed_tokens
        self._decoder_config = decoder_of(student.model).config
        self._inference_attention = self._decoder_config._attn_implementation  # noqa: SLF001
        self.untrained_config = deepcopy(student.model.config)
        """The student's config as it was loaded; Trainer switches its cache off."""
        self.vocab = student.vocab
        opener = DistributedOpener if arguments.world_size > 1 else AdaptiveOpener
        self.adaptive = opener() if not selection and objective.opener == "adaptive" else None
        self._means = StepMeans()
        self._times = StepTimes(student.device)
        self._inference_forward = student.model.forward
        if packed_tokens:
            self._decoder_config._attn_implementation = training_attention(self._decoder_config)  # noqa: SLF001
        # The loss is part of the forward, where wrappers such as DDP and FSDP expect every use of a weight.
        student.model.forward = partial(self.training_forward, student.model)
        samples: Any = torch.utils.data.Subset(source, indices)  # type: ignore[arg-type]  # a Source is a Dataset
        super().__init__(student.model, arguments, data_collator=list, train_dataset=samples, eval_dataset=held_out)
        require_supported_strategy(
            self.accelerator.distributed_type, getattr(self.accelerator.state, "fsdp_plugin", None)
        )
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = True  # compute_loss already averages over the optimizer batch

    def training_forward(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor,
        predicting: Tensor,
        response_mask: Tensor,
        teacher: TeacherSignal | None,
        snapshot: ScoringSnapshot | SamplingSnapshot | None = None,
        context: ResponseContext = NO_CONTEXT,
        selected: dict[str, Weighted] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The student's forward during training: loss and metrics. `teacher` is None in a batch without samples."""
        hidden = hidden_states(model, input_ids, attention_mask, position_ids)
        output = model.get_output_embeddings()
        zero = output(hidden[:, :0]).sum()  # FSDP gathers the head's weights when the head is called, on every rank
        if teacher is None:  # every weight takes part, with gradient 0
            if self.adaptive:
                self.adaptive.update([])
            return 0 * hidden.sum() + zero, {}
        hidden, head = hidden[predicting], output_head(model, self.vocab)
        ids = predicted_ids({"input_ids": input_ids, "predicting": predicting})
        sampling_log_probs = snapshot.log_probs if isinstance(snapshot, ScoringSnapshot) else None
        with timed("objective"):
            loss, metrics = token_selective_loss_from_hidden(
                hidden,
                head,
                teacher,
                response_mask,
                self.objective,
                self.adaptive.fraction if self.adaptive else None,
                compiled=self.compiled,
                sampled=SampledTokens(ids, self.source.teacher_fraction, sampling_log_probs),
                context=context,
                selected=selected,
            )
        if isinstance(output, FSDPModule):
            loss = loss + zero
        return loss, metrics | (snapshot.compare(hidden, head) if snapshot else {})

    @contextmanager
    def inference_student(self) -> Iterator[LanguageModel]:
        """The student with its current weights and its own forward, in evaluation mode and training precision."""
        model = base_with_adapters(self.student.model)
        training, training_forward = self.student.model.training, self.student.model.forward
        self.student.model.forward = self._inference_forward
        self.student.model.eval()
        attention = replaced_attribute(self._decoder_config, "_attn_implementation", self._inference_attention)
        try:
            with attention, torch.no_grad(), self.accelerator.autocast():
                yield replace(self.student, model=model)
        finally:
            self.student.model.forward = training_forward
            self.student.model.train(training)

    def get_train_dataloader(self) -> EpochLoader:
        args = self.args  # packed micro-batches are made from whole optimizer batches, on every rank
        ranks = (0, 1) if self.packed_tokens else (args.process_index, args.world_size)
        self.micro_batches = MicroBatches(len(self.train_dataset), args.train_batch_size, args.seed, *ranks)
        return EpochLoader(self.train_dataset, batch_sampler=self.micro_batches, collate_fn=self.data_collator)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[Sequence[Any], Any]:
        """The micro-batches of one optimizer step, with responses, and the number of responses over all ranks.

        All packed micro-batches of a step are one entry, because Trainer expects as many entries in every step.
        """
        self._times.start()
        micro_batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        samples = [sample for micro_batch in micro_batches for sample in micro_batch]
        if self.packed_tokens:
            own = self._with_responses(self._own_part(samples))
            everywhere = gather_object(own) if self.args.world_size > 1 else own
            packed = self._read_ahead(self._pack(everywhere, self.packed_tokens))
            self._select_step(packed)
            return [{"micro_batches": packed}], self._count_responses(packed.samples, device)
        padded = self._read_ahead(grouped(self._with_responses(samples), micro_batches))
        self._select_step(padded)
        return padded, self._count_responses(padded.samples, device)

    def _select_step(self, batches: LazyBatches) -> None:
        """With a method that selects from whole steps: read all micro-batches once, and select. Every rank calls it."""
        selection = self.selection
        if selection is None or not selection.of_whole_steps:
            return
        found = [(turns_of_samples(samples), dict[str, Tensor]()) for samples in batches.samples]
        if selection.method.reads_twice:
            with self.inference_student() as inference:
                student = unsharded(inference)
                head = output_head(student.model, self.vocab)
                found = [
                    (batch.pop("samples"), selection.read(student, head, self.source, self._prepare_inputs(batch)))
                    for batch in batches
                    if batch["samples"]
                ]
        selection.select_step(found, self.state.global_step, self.state.max_steps, self.args.world_size)

    def _with_responses(self, samples: list[Sample]) -> list[Sample]:
        step, seed = self.state.global_step, self.args.seed
        with self.inference_student():  # the sampler gets the whole module, whose forward gathers sharded weights
            progress = step / self.state.max_steps
            samples = self.source.with_responses(samples, self.student, (seed, step), progress)
            if isinstance(self.source, AheadSource) and step + 1 < self.state.max_steps:
                self.source.sample_ahead(self._samples_of(step + 1), self.student, (seed, step + 1))
        return samples

    def _samples_of(self, step: int) -> list[Sample]:
        """The samples of an optimizer step, counted from 0, whose responses this rank samples."""
        batches = self.micro_batches.of_step(step, self.args.gradient_accumulation_steps)
        samples = [self.train_dataset[i] for batch in batches for i in batch]
        return self._own_part(samples) if self.packed_tokens else samples

    def _own_part(self, samples: list[Sample]) -> list[Sample]:
        """The part of all ranks' samples whose responses this rank samples."""
        rank, ranks = self.args.process_index, self.args.world_size
        return samples[len(samples) * rank // ranks : len(samples) * (rank + 1) // ranks]

    def _pack(self, samples: list[Sample], tokens: int) -> list[list[Sample]]:
        ranks = self.args.process_index, self.args.world_size
        batches = pack_samples(list(map(sample_length, samples)), tokens, *ranks, in_order=self.adaptive is not None)
        return [[samples[i] for i in batch] for batch in batches]

    def _read_ahead(self, micro_batches: list[list[Sample]]) -> LazyBatches:
        """The micro-batches of this rank, which several teachers read one after the other."""
        with timed("teacher"):
            samples = self.source.read_ahead([sample for micro_batch in micro_batches for sample in micro_batch])
        return LazyBatches(grouped(samples, micro_batches), self._collate)

    def _count_responses(self, micro_batches: list[list[Sample]], device: torch.device) -> Any:
        """The turns of all ranks' samples."""
        turns = sum(len(sample_turns(sample)) for micro_batch in micro_batches for sample in micro_batch)
        return self.accelerator.reduce(torch.tensor(turns, device=device), reduction="sum")

    def _collate(self, samples: list[Sample]) -> Batch:
        packed = self.packed_tokens is not None
        if not samples:  # the last samples of the epoch are on other ranks; this rank runs the forward with them
            return empty_batch(packed=packed) | {"samples": []}
        return collate(samples, self.source, packed=packed) | {"samples": turns_of_samples(samples)}

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of one padded micro-batch, or of all packed ones of the step."""
        if "micro_batches" not in inputs:
            with timed("student"):
                loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
            return loss
        batches, losses = inputs["micro_batches"], []
        for i, batch in enumerate(batches):
            last = i == len(batches) - 1
            sync = nullcontext() if last else self.accelerator.no_sync(model)  # ranks exchange gradients once
            with sync, timed("student"):
                losses.append(super().training_step(model, batch, num_items_in_batch))
        return torch.stack(losses).sum()

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        samples = inputs.pop("samples")
        # Wrappers cast the tensors among a forward's arguments to their own precision, but not those inside objects.
        with timed("teacher"):
            teacher = self.source.signal(inputs) if samples else None
        snapshot = self.source.scoring_snapshot(inputs) if samples else None
        del inputs["recorded"]
        own: dict[str, Any] = {}
        if self.selection and samples:
            own = self.selection.inputs(samples, inputs["response_mask"], self.state.global_step, self.state.max_steps)
        loss, metrics = model(**inputs, teacher=teacher, snapshot=snapshot, **own)
        if not torch.isfinite(loss):
            self._raise_not_finite(loss, metrics, samples)
        responses = len(inputs["response_mask"])
        metrics = square_grad_norms(metrics, responses)
        if samples:
            self._means.add(metrics | response_health(samples), responses)
        return loss * responses / num_items_in_batch * self.accelerator.num_processes

    def _raise_not_finite(self, loss: Tensor, metrics: dict[str, Tensor], samples: list[Sample]) -> None:
        terms = [name for name in self.terms if not metrics.get(name, loss.new_zeros(())).isfinite()]
        raise TsdkdError(
            f"The loss is {loss.item()} at step {self.state.global_step + 1} ({', '.join(terms) or 'sum'}), "
            f"samples {', '.join(dict.fromkeys(sample['sample_id'] for sample in samples))}.",
            "Lower --learning-rate, or inspect these samples. The last saved step is kept.",
        )

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Divergence from the teacher, or cross-entropy, and other means over the held-out samples' tokens."""
        assert self.held_out is not None
        with self.inference_student() as inference:
            student = unsharded(inference)
            head = output_head(student.model, self.vocab)
            ranks = {"rank": self.args.process_index, "world_size": self.args.world_size}
            measured = measure_held_out(student, head, self.held_out, **ranks)
        metrics = {str(self.args.metric_for_best_model): measured["kl"], "eval_student_entropy": measured["entropy"]}
        if "top1_agreement" in measured:
            metrics["eval_top1_agreement"] = measured["top1_agreement"]
        for name, values in measured.get("teachers", {}).items():
            own = {str(self.args.metric_for_best_model): values["kl"], "eval_tokens": values["tokens"]}
            own |= {"eval_top1_agreement": values["top1_agreement"]} if "top1_agreement" in values else {}
            metrics |= {teacher_metric(key, name): value for key, value in own.items()}
        self.log(metrics)
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if not math.isfinite(logs.get("grad_norm", 0.0)):  # logged before this step is saved
            raise TsdkdError(
                f"The gradient is not finite at step {self.state.global_step}.",
                "Lower --learning-rate or --max-grad-norm. Nothing of this step was saved.",
            )
        if is_step(logs):
            logs.update(self._means.pop(self.args.world_size))
            logs.update(pop_grad_shares(logs))
            if self.selection:
                self.selection.update(logs)
            if isinstance(self.source, AheadSource):
                logs["rollout_age"] = self.source.age
            logs.update({f"{TIMES}{part}": seconds for part, seconds in self._times.pop().items()})
        super().log(logs, start_time)
