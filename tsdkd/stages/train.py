"""train: rollouts + scores -> checkpoint. The student learns from what was recorded; the teacher is absent.

Everything is per response, then averaged over the optimizer batch's responses: micro-batches and padding do not change
the update. Killed at any moment, a run continues from its last saved step and ends with the same weights.
"""

import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, TrainingArguments

from tsdkd.artifacts import Artifact, Manifest, Writer, load_manifest
from tsdkd.errors import InputError
from tsdkd.stages.config import TrainConfig
from tsdkd.stages.models import default_device, describe, libraries, load_model, require_same_tokenizer
from tsdkd.stages.report import Reporter, Silent
from tsdkd.stages.staged import StagedSamples
from tsdkd.stages.trainer import SAVED, MarkWhole, ShowProgress, StagedTrainer, StopWhenAsked, last_whole_checkpoint

METRICS_FILE = "metrics.jsonl"
DTYPE = {"bf16": torch.bfloat16, "fp32": torch.float32}


def train(
    rollouts: Path,
    scores: Path,
    student: str,
    output: Path,
    config: TrainConfig,
    seed: int = 0,
    reporter: Reporter | None = None,
    overwrite: bool = False,
) -> Artifact:
    """Distil staged scores into the student. Raises InputError before anything is written.

    Raises KeyboardInterrupt after an interrupted step was finished and saved, TsdkdError when the loss is not finite.
    """
    reporter = reporter or Silent()
    samples = StagedSamples(rollouts, scores)
    samples.decoder.require(config.objective)
    if config.compile and samples.decoder.head is None:
        raise InputError(
            f"--compile needs the teacher's hidden states, but these scores hold {samples.decoder.signal!r}.",
            "Leave out --compile, or score with --signal hidden.",
        )
    start = describe("student", student)
    require_same_tokenizer(start, samples.scores.manifest.model("student"))
    scored = samples.scores.manifest.model("student")
    if start.weights != scored.weights:
        reporter.say(f"The student is another than the one that was scored ({scored.name}).")
    resume, staging = output / "resume", output / "staging.tmp"
    precision = _precision(config)
    arguments = _arguments(config, precision, seed, resume)
    manifest = Manifest(
        kind="checkpoint",
        config={name: value for name, value in asdict(config).items() if name != "save_steps"}
        | {"precision": precision},
        seed=seed,
        parents=(samples.rollouts.as_parent_of(output), samples.scores.as_parent_of(output)),
        models=(start, samples.scores.manifest.model("teacher")),
        libraries=libraries(),
    )
    first = arguments.process_index == 0  # with several processes, only this one writes and speaks
    state = PartialState()
    with Writer.open(output, manifest, overwrite=overwrite) if first else nullcontext() as writer:
        state.wait_for_everyone()  # until then the artifact is not what this run makes
        if load_manifest(output).state == "complete":
            reporter.say(f"{output} is complete: nothing to do.")
            return Artifact(output, load_manifest(output))
        language_model = load_model(student, "float32")
        trainer = StagedTrainer(language_model, samples, arguments, config.objective, config.compile)
        _run(trainer, resume, reporter)
        weights = trainer.accelerator.get_state_dict(trainer.model)
        if writer is not None:
            _save(trainer, weights, language_model.tokenizer, staging, DTYPE[precision])
            writer.adopt(staging)
            writer.finish(_summary(trainer))
            shutil.rmtree(staging)
            shutil.rmtree(resume)
        state.wait_for_everyone()
        return Artifact(output, load_manifest(output))


def _run(trainer: StagedTrainer, resume: Path, reporter: Reporter) -> None:
    last = last_whole_checkpoint(resume)
    if last and trainer.adaptive:
        trainer.adaptive.load_state_dict(json.loads((last / SAVED).read_text()))
    stop = StopWhenAsked()
    with ExitStack() as stack:
        for callback in (MarkWhole(trainer.adaptive), ShowProgress(reporter, stack), stop):
            trainer.add_callback(callback)
        with _interrupts_set(stop):
            trainer.train(resume_from_checkpoint=str(last) if last else None)
    if stop.requested:
        raise KeyboardInterrupt


@contextmanager
def _interrupts_set(stop: StopWhenAsked) -> Iterator[None]:
    """The first Ctrl-C lets the step end and saves it; a second one stops at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def request(*_: object) -> None:
        stop.requested = True
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, request)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _arguments(config: TrainConfig, precision: str, seed: int, directory: Path) -> TrainingArguments:
    processes = int(os.environ.get("WORLD_SIZE", "1"))  # as torchrun and accelerate launch say it
    micro = min(config.micro_batch_size, config.batch_size // processes)
    if not micro or config.batch_size % (micro * processes):
        raise InputError(
            f"A batch of {config.batch_size} cannot be made of micro-batches of {micro} in {processes} processes.",
            "Choose a --batch-size that is a multiple of --micro-batch-size times the number of processes.",
        )
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
        bf16=precision == "bf16",
        ddp_find_unused_parameters=False,
        use_cpu=default_device() == "cpu",
        gradient_checkpointing=config.gradient_checkpointing,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_steps=config.save_steps,
        save_total_limit=2,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=[],
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs are for several processes, not for DataParallel
    return arguments


def _precision(config: TrainConfig) -> str:
    if config.precision != "auto":
        return config.precision
    on_gpu = default_device() == "cuda"
    has_bf16 = torch.cuda.is_bf16_supported() if on_gpu else torch.cpu._is_avx512_bf16_supported()
    return "bf16" if has_bf16 else "fp32"


def _save(
    trainer: StagedTrainer,
    weights: dict[str, torch.Tensor],
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    dtype: torch.dtype,
) -> None:
    """What transformers loads, in the precision of the forward that was trained.

    The float32 weights behind a bf16 forward hold updates too small for it to see; used in float32 they would all take
    effect at once, as a model that no step has looked at.
    """
    trained = trainer.accelerator.unwrap_model(trainer.model)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(trained.config, dtype=dtype)
    model.load_state_dict({name: weight.to(dtype) for name, weight in weights.items()}, assign=True)
    model.tie_weights()
    model.generation_config = trained.generation_config
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    lines = [json.dumps(step, sort_keys=True) + "\n" for step in trainer.logged_steps]
    (directory / METRICS_FILE).write_text("".join(lines))


def _summary(trainer: StagedTrainer) -> dict[str, float]:
    steps = trainer.logged_steps
    shown = ("loss", "indirect", "direct", "entropy", "student_entropy")
    ends = {"first": steps[0], "last": steps[-1]}
    return {"steps": len(steps)} | {
        f"{name}_{end}": entry[name] for end, entry in ends.items() for name in shown if name in entry
    }
