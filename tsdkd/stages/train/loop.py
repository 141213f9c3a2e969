"""One run of training, offline or online: from its inputs to a complete checkpoint, resumable at every saved step."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import PartialState

from tsdkd.artifacts.files import TIMES_FILE
from tsdkd.artifacts.locks import read_holder
from tsdkd.artifacts.manifest import Manifest, ModelRecord, Parent, load_manifest
from tsdkd.artifacts.reader import Artifact
from tsdkd.artifacts.replacing import SAVED_STEPS
from tsdkd.artifacts.writer import Writer
from tsdkd.errors import OtherRankError, TsdkdError
from tsdkd.processes import rank
from tsdkd.stages.config.chat import ChatConfig
from tsdkd.stages.config.train import TrainConfig
from tsdkd.stages.config.types import DType
from tsdkd.stages.data.held_out import HeldOut
from tsdkd.stages.data.replay import ReplaySource
from tsdkd.stages.data.rollout_ahead import AheadSource
from tsdkd.stages.data.source import Source
from tsdkd.stages.methods import find_method
from tsdkd.stages.metrics.log import METRICS_FILE
from tsdkd.stages.models import memory
from tsdkd.stages.models.attention import require_attention
from tsdkd.stages.models.device import default_device, forward_precision
from tsdkd.stages.models.language_model import LanguageModel
from tsdkd.stages.models.load import load_model
from tsdkd.stages.models.new_adapters import add_lora
from tsdkd.stages.models.record import library_versions
from tsdkd.stages.models.spec import load_config
from tsdkd.stages.observer import Observer
from tsdkd.stages.train.callbacks import (
    HealthCallback,
    LogCallback,
    OptimizerTimesCallback,
    ProgressCallback,
    ReplayCallback,
)
from tsdkd.stages.train.checkpoint import save_checkpoint
from tsdkd.stages.train.hosts import agree_on_directory, require_same_inputs
from tsdkd.stages.train.interruption import InterruptCallback, stopping_on_signals
from tsdkd.stages.train.packing import require_packed_length, require_packing
from tsdkd.stages.train.prerequisites import require_full_weights
from tsdkd.stages.train.resume import StateCallback, Stateful, find_intact_step, has_saved_step, step_number
from tsdkd.stages.train.settings import (
    bitsandbytes_version,
    recorded_settings,
    require_compiler,
    reset_overrides,
    training_arguments,
)
from tsdkd.stages.train.step_selection import StepSelection
from tsdkd.stages.train.summary import training_summary
from tsdkd.stages.train.trainer import DistillationTrainer


class TrainingData(NamedTuple):
    """Samples, divided into those that are trained on and those that are measured on."""

    source: Source
    indices: list[int]
    """The samples that are trained on."""
    held_out: HeldOut | None


@dataclass(frozen=True)
class TrainingInputs:
    """The inputs of `run_training`, for offline and online training alike."""

    student: ModelRecord
    teachers: tuple[ModelRecord, ...]
    """Empty for given responses without scores."""
    parents: tuple[Parent, ...]
    max_length: int
    """Tokens of the longest prompt with its response."""
    vocab: int
    """Ids that student and teachers all know."""
    end_ids: list[int]
    """Ids that end a response: the student's own, those of the teachers and that of the chat template."""
    open_data: Callable[[LanguageModel], AbstractContextManager[TrainingData]]
    """Opens the data for the loaded student; closing it releases what it loaded."""
    day: str | None = None
    """The day that the chat template of the prompts writes."""
    chat: ChatConfig | None = None
    """The chat format that the checkpoint's tokenizer gets."""


def run_training(
    inputs: TrainingInputs, output: Path, config: TrainConfig, seed: int, observer: Observer, overwrite: bool
) -> Artifact:
    """Train, or resume, and write the checkpoint. Raises the errors of `train_offline` and `train_online`."""
    precision = forward_precision(config.precision)
    arguments = training_arguments(config, precision, seed, output)
    require_full_weights(inputs.student)
    models = (inputs.student, *inputs.teachers)
    loaded = [model for model in models if config.online and not model.served] or [inputs.student]
    require_attention(config.attention, [model.name for model in loaded])
    require_packed_length(inputs.max_length, config)
    if config.compile:
        require_compiler(default_device())
    method = find_method(config.method)  # a file may change during the run
    selection = StepSelection.of_method(method, config.method_options, seed)
    (selection.objective if selection else config.objective).check_vocab(inputs.vocab)
    manifest = checkpoint_manifest(models, inputs.parents, config, seed, inputs.day)
    with _open_directory(output, manifest, overwrite) as (writer, directory), observer.writing(directory):
        if load_manifest(directory).state == "complete":
            observer.info(f"{output} is complete: nothing to do.")
            return Artifact(output, load_manifest(output))
        resume, staging = directory / SAVED_STEPS, directory / "staging.tmp"
        arguments.output_dir = str(resume)
        _require_memory(inputs, config, precision, observer)
        student = load_model(
            inputs.student.name,
            _weights_dtype(config, precision),
            attention=config.attention,
            observer=observer,
            chat=inputs.chat,
            quantize=config.quantize,
        )
        student = replace(student, shared_vocab=inputs.vocab, pair_end_ids=inputs.end_ids)
        _ = student.head  # raises InputError for a head that the objective does not support
        if config.micro_batch_tokens:
            require_packing(student)
        with inputs.open_data(student) as data:
            if config.lora:
                student = add_lora(student, config.lora, seed)
            with _removed_unless_saved(resume), reset_overrides(config.optimizer):
                trainer = DistillationTrainer(
                    student, *data, arguments, config.objective, config.compile, config.micro_batch_tokens, selection
                )
                degenerated_at = _train(trainer, resume, observer, stop_on_degeneration=config.stop_on_degeneration)
        save_checkpoint(trainer, config.lora, method, manifest, staging, getattr(torch, precision))
        if writer is not None:
            writer.add_directory(staging)
            shutil.rmtree(staging)
            writer.finish(training_summary(trainer, degenerated_at), observer.info)
            shutil.rmtree(writer.path / SAVED_STEPS, ignore_errors=True)  # the next command deletes what remains
        PartialState().wait_for_everyone()
        return Artifact(output, load_manifest(output))


def checkpoint_manifest(
    models: tuple[ModelRecord, ...],
    parents: tuple[Parent, ...],
    config: TrainConfig,
    seed: int,
    day: str | None = None,
) -> Manifest:
    """`models`: the student and the teachers."""
    return Manifest(
        kind="checkpoint",
        config=recorded_settings(config) | {"precision": forward_precision(config.precision)},
        seed=seed,
        parents=parents,
        models=models,
        libraries=library_versions() | bitsandbytes_version(config),
        day=day,
    )


@contextmanager
def _open_directory(output: Path, manifest: Manifest, overwrite: bool) -> Iterator[tuple[Writer | None, Path]]:
    """The writer, which only rank 0 has, and the directory that all ranks write to."""
    PartialState()  # connects the ranks
    require_same_inputs(manifest)
    with _open_writer(output, manifest, overwrite) as writer:
        yield writer, agree_on_directory(writer.path if writer else None)


def _open_writer(output: Path, manifest: Manifest, overwrite: bool) -> AbstractContextManager[Writer | None]:
    if rank() != 0:
        return nullcontext()
    try:
        return Writer.open(output, manifest, overwrite=overwrite)
    except Exception:
        with suppress(OtherRankError, RuntimeError):
            agree_on_directory(None)
        raise


def _require_memory(inputs: TrainingInputs, config: TrainConfig, precision: str, observer: Observer) -> None:
    """Show the memory that training needs. Raises InputError when its fixed part does not fit."""
    student = load_config(inputs.student.name)
    needed = inputs.teachers if find_method(config.method).needs_teacher else ()
    teachers = [load_config(teacher.name) for teacher in needed if not teacher.served]
    estimate = memory.estimate_training_memory(student, teachers, inputs.max_length, config, precision)
    advice = memory.require_memory(estimate, config)
    observer.table("Memory needed for training", estimate.rows())
    if advice:
        observer.warning(advice)


def _weights_dtype(config: TrainConfig, precision: str) -> DType:
    """Trained weights are float32; frozen weights beside adapters are loaded in the forward's precision."""
    return "bfloat16" if config.lora and precision == "bfloat16" else "float32"


@contextmanager
def _removed_unless_saved(resume: Path) -> Iterator[None]:
    """After a failure, remove a directory without a saved step: it would only refuse other settings.

    Only ranks on the host that saves do so: other hosts may see a saved step late.
    """
    try:
        yield
    except BaseException:
        holder = read_holder(resume.parent)
        if (rank() == 0 or (holder and holder.is_here)) and not has_saved_step(resume):
            shutil.rmtree(resume, ignore_errors=True)  # another rank may remove it first
        raise


def _train(trainer: DistillationTrainer, resume: Path, observer: Observer, *, stop_on_degeneration: bool) -> int | None:
    """Train to the end.

    Returns the step at which a degenerate run was stopped; the trainer then holds the best or the last saved step.
    """
    last = _find_last_step(resume, observer)
    schedule = trainer.source.schedule if isinstance(trainer.source, ReplaySource) else None
    ahead = trainer.source if isinstance(trainer.source, AheadSource) else None
    selection = trainer.selection if trainer.selection and trainer.selection.of_whole_steps else None
    stateful: dict[str, Stateful | None] = {"adaptive": trainer.adaptive, "replay": schedule, "ahead": ahead}
    stateful["method"] = selection
    states = StateCallback({name: value for name, value in stateful.items() if value is not None})
    if last:
        states.restore(last)
    interrupt, health = InterruptCallback(), HealthCallback(observer, stop=stop_on_degeneration)
    with ExitStack() as stack:
        for callback in (
            *([ReplayCallback(schedule, observer)] if schedule else []),
            states,
            ProgressCallback(observer, stack),
            LogCallback(resume / METRICS_FILE, resume.parent / TIMES_FILE),
            OptimizerTimesCallback(),
            health,
            interrupt,
        ):
            trainer.add_callback(callback)
        with stopping_on_signals(interrupt, observer):
            trainer.train(resume_from_checkpoint=str(last) if last else None)
    if interrupt.requested:
        raise KeyboardInterrupt
    if health.stopped_at is not None and trainer.state.best_model_checkpoint is None:  # else the best step is loaded
        _restore_last_step(trainer, resume, health.stopped_at, observer)
    return health.stopped_at


def _find_last_step(resume: Path, observer: Observer) -> Path | None:
    """The saved step to continue after; a warning names those that are not intact."""
    last, faults = find_intact_step(resume)
    if faults:
        start = f"continues after step {step_number(last)}" if last else "starts from the beginning"
        observer.warning(f"Damaged saved steps were deleted: {faults}. Training {start}.")
    elif last:
        observer.info(f"Resuming after step {step_number(last)}.")
    return last


def _restore_last_step(trainer: DistillationTrainer, resume: Path, stopped_at: int, observer: Observer) -> None:
    step, faults = find_intact_step(resume)
    if faults:
        observer.warning(f"Damaged saved steps were deleted: {faults}.")
    if step is None:
        raise TsdkdError(
            f"The run degenerated at step {stopped_at}, before a step was saved.",
            "Lower --learning-rate or --em-weight, and save more often (--save-steps).",
        )
    trainer.restore_step(step)
    observer.warning(f"Training stopped; the checkpoint is step {trainer.state.global_step}.")
