"""A Trainer that forms the micro-batches of each optimizer step: it samples responses, packs or pads, and selects."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import PreTrainedConfig

from tsdkd.core import AdaptiveOpener
from tsdkd.stages.data.batches import Batch
from tsdkd.stages.data.rollout_ahead import AheadSource
from tsdkd.stages.data.source import (
    Sample,
    Source,
    collate,
    empty_batch,
    sample_length,
    sample_turns,
    turns_of_samples,
)
from tsdkd.stages.metrics.step_times import StepTimes, timed
from tsdkd.stages.models.adaptable import base_with_adapters
from tsdkd.stages.models.attributes import replaced_attribute
from tsdkd.stages.models.language_model import LanguageModel
from tsdkd.stages.train.batch_order import EpochLoader, LazyBatches, MicroBatches, grouped, pack_samples
from tsdkd.stages.train.saved_steps import StepSavingTrainer
from tsdkd.stages.train.step_selection import StepSelection


class StepBatchesTrainer(StepSavingTrainer):
    """Forms the micro-batches of each optimizer step. A subclass sets its attributes."""

    student: LanguageModel
    source: Source
    selection: StepSelection | None
    """That of a method with its own losses."""
    vocab: int
    packed_tokens: int | None
    """The most tokens of a packed micro-batch; None: micro-batches are padded."""
    adaptive: AdaptiveOpener | None
    _times: StepTimes
    _inference_forward: Any
    _decoder_config: PreTrainedConfig
    _inference_attention: Any

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
        """If the method selects from whole steps, read all micro-batches and select. Every rank must call it."""
        selection = self.selection
        if selection is None or not selection.of_whole_steps:
            return
        if selection.method.reads_twice:
            found = self._read_features(selection, batches)
        else:
            found = [(turns_of_samples(samples), {}) for samples in batches.samples]
        selection.select_step(found, self.state.global_step, self.state.max_steps, self.args.world_size)

    def _read_features(
        self, selection: StepSelection, batches: LazyBatches
    ) -> list[tuple[list[Sample], dict[str, Tensor]]]:
        """The responses of each micro-batch with their features.

        All ranks must make the same number of forward calls, because each call gathers sharded weights.
        """
        model, found = self.student.model, []
        with self.inference_student():
            model.forward = partial(selection.read, model, self.vocab)
            for batch in batches:
                samples, inputs = batch.pop("samples"), self._prepare_inputs(batch)
                with timed("teacher"):
                    teacher = self.source.signal(inputs) if samples else None
                del inputs["recorded"]
                with timed("student"):
                    found.append((samples, model(**inputs, teacher=teacher)))
        return found

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
        """This rank's micro-batches, after servers or several teachers have read their samples."""
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
