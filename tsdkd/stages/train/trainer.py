"""transformers' Trainer with the token-selective objective.

It differs from Trainer in the loss, which is averaged over the responses of the whole optimizer batch; in the order of
the samples and their responses; in evaluation on held-out samples; and in the metrics that every log entry carries.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from copy import deepcopy
from functools import partial
from typing import Any

import torch
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
from tsdkd.errors import NotFiniteError
from tsdkd.stages.data.batches import predicted_ids
from tsdkd.stages.data.held_out import HeldOut, measure_held_out
from tsdkd.stages.data.rollout_ahead import AheadSource
from tsdkd.stages.data.source import Sample, SamplingSnapshot, ScoringSnapshot, Source
from tsdkd.stages.metrics.grad_shares import pop_grad_shares, square_grad_norms
from tsdkd.stages.metrics.health import response_health
from tsdkd.stages.metrics.log import TIMES, is_step
from tsdkd.stages.metrics.names import teacher_metric
from tsdkd.stages.metrics.step_means import StepMeans
from tsdkd.stages.metrics.step_times import StepTimes, timed
from tsdkd.stages.models.distributed import require_supported_strategy, unsharded
from tsdkd.stages.models.language_model import LanguageModel, decoder_of, hidden_states, output_head
from tsdkd.stages.models.packed_attention import training_attention
from tsdkd.stages.train.batch_order import DistributedOpener
from tsdkd.stages.train.step_batches import StepBatchesTrainer
from tsdkd.stages.train.step_selection import StepSelection


class DistillationTrainer(StepBatchesTrainer):
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
        raise NotFiniteError(
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
            raise NotFiniteError(
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
