"""One run of training, staged or live: from a job to a finished checkpoint, resumable at every saved step."""

import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from tsdkd.artifacts.manifest import Manifest, ModelRecord, Parent, load_manifest
from tsdkd.artifacts.reader import Artifact
from tsdkd.artifacts.writer import Writer
from tsdkd.errors import InputError, TsdkdError
from tsdkd.ranks import world_size
from tsdkd.stages.config.generate import SPEED_ONLY_FIELDS
from tsdkd.stages.config.train import TrainConfig
from tsdkd.stages.config.types import DType
from tsdkd.stages.data.held_out import HeldOut
from tsdkd.stages.data.replay import ReplaySource
from tsdkd.stages.data.sources import Source
from tsdkd.stages.methods import find_method
from tsdkd.stages.models import memory
from tsdkd.stages.models.adapters import is_adapter
from tsdkd.stages.models.device import default_device, forward_precision
from tsdkd.stages.models.load import LanguageModel, load_model
from tsdkd.stages.models.lora import add_lora
from tsdkd.stages.models.paths import model_directory
from tsdkd.stages.models.record import library_versions
from tsdkd.stages.models.spec import load_config
from tsdkd.stages.observer import Observer
from tsdkd.stages.train.callbacks import (
    MarkComplete,
    MonitorHealth,
    ShowProgress,
    Stateful,
    StopOnRequest,
    UpdateReplaySchedule,
    WriteLog,
    last_complete_checkpoint,
)
from tsdkd.stages.train.checkpoint import METRICS_FILE, save_checkpoint
from tsdkd.stages.train.trainer import DistillationTrainer


@dataclass(frozen=True)
class TrainingJob:
    """What staged and live training differ in."""

    student: ModelRecord
    teacher: ModelRecord
    parents: tuple[Parent, ...]
    longest: int
    """Tokens of the longest sequence."""
    open: Callable[[LanguageModel], AbstractContextManager[tuple[Source, list[int], HeldOut | None]]]
    """Student -> all samples, those it learns from, and those it is measured on."""


def run_training(
    job: TrainingJob, output: Path, config: TrainConfig, seed: int, observer: Observer, overwrite: bool
) -> Artifact:
    """Raises as `train.train`."""
    resume, staging = output / "resume", output / "staging.tmp"
    precision = forward_precision(config.precision)
    arguments = _arguments(config, precision, seed, resume)
    _require_no_adapter(job.student, config)
    if config.compile:
        _require_compiler(default_device())
    manifest = Manifest(
        kind="checkpoint",
        config=_identity(config) | {"precision": precision},
        seed=seed,
        parents=job.parents,
        models=(job.student, job.teacher),
        libraries=library_versions(),
    )
    first = arguments.process_index == 0  # with several processes, only this one writes and speaks
    state = PartialState()
    opened = Writer.open(output, manifest, overwrite=overwrite) if first else nullcontext()
    with opened as writer, observer.writing(output):
        state.wait_for_everyone()  # until then the artifact is not what this run makes
        if load_manifest(output).state == "complete":
            observer.info(f"{output} is complete: nothing to do.")
            return Artifact(output, load_manifest(output))
        _state_needs(job, config, precision, observer)
        learner = load_model(job.student.name, _loaded_as(config, precision), attention=config.attention)
        _ = learner.head  # refused here when it does more than the objective knows
        with job.open(learner) as (source, learned, held_out):
            if config.lora:
                learner = add_lora(learner, config.lora, seed)
            trainer = DistillationTrainer(
                learner, source, learned, held_out, arguments, config.objective, config.compile
            )
            with _nothing_left_of_nothing(resume):
                collapsed = _run(trainer, resume, observer, stop_on_collapse=config.stop_on_collapse)
        save_checkpoint(trainer, config.lora, manifest, staging, getattr(torch, precision))
        if writer is not None:
            writer.adopt(staging)
            writer.finish(_summary(trainer, collapsed))
            shutil.rmtree(staging)
            shutil.rmtree(resume)
        state.wait_for_everyone()
        return Artifact(output, load_manifest(output))


def _identity(config: TrainConfig) -> dict[str, Any]:
    """The settings that change the result."""
    settings = asdict(config)
    del settings["trackers"]
    if not config.stop_on_collapse:  # a collapsed run goes back to a saved step
        del settings["save_steps"]
    if config.online:
        del settings["online"]["teacher_device"]
        for name in SPEED_ONLY_FIELDS:
            del settings["online"]["sampling"][name]
    return settings


def _state_needs(job: TrainingJob, config: TrainConfig, precision: str, observer: Observer) -> None:
    teacher = load_config(job.teacher.name) if find_method(config.method).teacher else None
    needed = memory.estimate_training_memory(load_config(job.student.name), teacher, job.longest, config, precision)
    advice = memory.require_memory(needed, config)
    observer.table("What training will need", needed.rows())
    if advice:
        observer.warning(advice)


@contextmanager
def _nothing_left_of_nothing(resume: Path) -> Iterator[None]:
    """A run that fails before it saved a step leaves nothing that would keep another configuration out."""
    try:
        yield
    except BaseException:
        if last_complete_checkpoint(resume) is None:
            shutil.rmtree(resume, ignore_errors=True)  # another process may be faster
        raise


def _run(trainer: DistillationTrainer, resume: Path, observer: Observer, *, stop_on_collapse: bool) -> int | None:
    """Train to the end. Returns the step at which a degenerate run was stopped; its last good step is loaded then."""
    last = last_complete_checkpoint(resume)
    if last:
        observer.info(f"Continuing after step {last.name.split('-')[1]}.")
    schedule = trainer.source.schedule if isinstance(trainer.source, ReplaySource) else None
    kept: dict[str, Stateful | None] = {"adaptive": trainer.adaptive, "replay": schedule}
    mark = MarkComplete({name: stateful for name, stateful in kept.items() if stateful})
    if last:
        mark.restore(last)
    stop, health = StopOnRequest(), MonitorHealth(observer, stop=stop_on_collapse)
    with ExitStack() as stack:
        for callback in (
            *([UpdateReplaySchedule(schedule, observer)] if schedule else []),
            mark,
            ShowProgress(observer, stack),
            WriteLog(resume / METRICS_FILE),
            health,
            stop,
        ):
            trainer.add_callback(callback)
        with _interrupts_set(stop, observer):
            trainer.train(resume_from_checkpoint=str(last) if last else None)
    if stop.requested:
        raise KeyboardInterrupt
    if health.stopped_at is not None and trainer.state.best_model_checkpoint is None:  # else the best step is loaded
        good = last_complete_checkpoint(resume)
        if good is None:
            raise TsdkdError(
                f"The run degenerated at step {health.stopped_at}, before a step was saved.",
                "Lower --learning-rate or --em-weight, and save more often (--save-steps).",
            )
        trainer.go_back_to(good)
        observer.warning(f"Stopped; step {trainer.state.global_step} is kept.")
    return health.stopped_at


@contextmanager
def _interrupts_set(stop: StopOnRequest, observer: Observer) -> Iterator[None]:
    """The first Ctrl-C lets the step end and saves it; a second one stops at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def request(*_: object) -> None:
        stop.requested = True
        signal.signal(signal.SIGINT, before)
        observer.info("Interrupted: this step is finished and saved; once more stops at once.")

    before = signal.signal(signal.SIGINT, request)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _require_no_adapter(student: ModelRecord, config: TrainConfig) -> None:
    if is_adapter(model_directory(student.name)):
        raise InputError(
            f"{student.name} is an adapter; training starts from full weights.",
            "Train it with --lora --merge, or merge it into its model, and name the result.",
        )


def _require_compiler(device: str) -> None:
    if device == "cuda":
        if find_spec("triton") is None:
            raise InputError("--compile needs Triton on a GPU.", "Run `pip install triton`, or leave out --compile.")
        language, variable, compilers = "C", "CC", ["gcc", "clang"]
    else:
        language, variable, compilers = "C++", "CXX", ["g++"]
    compilers = [os.environ[variable]] if variable in os.environ else compilers
    if not any(map(shutil.which, compilers)):
        raise InputError(
            f"--compile needs a {language} compiler, and there is no {' or '.join(compilers)}.",
            f"Install one, name another by {variable}, or leave out --compile.",
        )


def _arguments(config: TrainConfig, precision: str, seed: int, directory: Path) -> TrainingArguments:
    processes = world_size()
    micro = min(config.micro_batch_size, config.batch_size // processes)
    if not micro or config.batch_size % (micro * processes):
        raise InputError(
            f"A batch of {config.batch_size} cannot be made of micro-batches of {micro} in {processes} processes.",
            "Choose a --batch-size that is a multiple of --micro-batch-size times the number of processes.",
        )
    measured = {
        "eval_strategy": "steps",
        "eval_steps": config.eval_steps,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_kl",
        "greater_is_better": False,
    }
    _require_trackers(config.trackers)
    arguments = TrainingArguments(
        output_dir=str(directory),
        seed=seed,
        learning_rate=config.learning_rate,
        num_train_epochs=config.epochs,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=config.batch_size // (micro * processes),
        warmup_steps=config.warmup_ratio,  # below 1 it is a share of all steps
        lr_scheduler_type=config.schedule,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        optim="adamw_torch",
        bf16=precision == "bfloat16",
        ddp_find_unused_parameters=False,
        use_cpu=default_device() == "cpu",
        gradient_checkpointing=config.gradient_checkpointing,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_steps=config.eval_steps or config.save_steps,
        save_total_limit=2,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=list(config.trackers),
        **(measured if config.eval_steps else {}),
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs are for several processes, not for DataParallel
    return arguments


def _require_trackers(names: Sequence[str]) -> None:
    try:
        for tracker in get_reporting_integration_callbacks(list(names)):
            tracker()
    except (ValueError, RuntimeError) as error:
        raise InputError(f"There is no such tracker ({error}).", "Install it, or leave out --tracker.") from None


def _loaded_as(config: TrainConfig, precision: str) -> DType:
    """Weights that learn are float32; those that adapters leave alone are what the forward needs."""
    return "bfloat16" if config.lora and precision == "bfloat16" else "float32"


def _summary(trainer: DistillationTrainer, collapsed: int | None) -> dict[str, float]:
    steps = trainer.logged_steps
    shown = (
        "loss",
        "indirect",
        "direct",
        "entropy",
        "policy_gradient",
        "student_entropy",
        "candidate_overlap",
        "drift",
    )
    ends = {"first": steps[0], "last": steps[-1]}
    summary = {"steps": len(steps)} | {
        f"{name}_{end}": entry[name] for end, entry in ends.items() for name in shown if name in entry
    }
    if trainer.state.best_metric is not None:
        summary |= {"kept_step": trainer.state.best_global_step, "kept_kl": trainer.state.best_metric}
    return summary | ({} if collapsed is None else {"collapsed_at": collapsed})
