"""A training configuration for transformers' Trainer and for the manifest, and the requirements of its options."""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from tsdkd.errors import InputError
from tsdkd.processes import shards_weights, world_size
from tsdkd.stages.config.chat import recorded_config
from tsdkd.stages.config.generate import recorded_sampling
from tsdkd.stages.config.optimizer import DEFAULT_OPTIMIZER, OPTIMIZERS, OptimizerName
from tsdkd.stages.config.train import MICRO_BATCH_SIZE, TrainConfig
from tsdkd.stages.methods import find_method
from tsdkd.stages.models.device import default_device


def recorded_settings(config: TrainConfig) -> dict[str, Any]:
    """The settings that change the result; the manifest records them, and a resumed run must have the same."""
    settings = recorded_config(config)
    del settings["trackers"], settings["method_options"]
    method = find_method(config.method)
    settings |= method.recorded(method.read_options(config.method_options))
    if config.micro_batch_tokens is None:
        settings["micro_batch_size"] = config.micro_batch_size or MICRO_BATCH_SIZE
        del settings["micro_batch_tokens"]
    if not config.stop_on_degeneration:  # a run that degenerates goes back to a saved step
        del settings["save_steps"]
    if config.optimizer == DEFAULT_OPTIMIZER:
        del settings["optimizer"]
    if config.lora and not config.quantize:
        del settings["lora"]["quantize"]
    if config.online:
        for name in ("teacher_device", "rollout_url", "rollout_gpus"):
            del settings["online"][name]
        settings["online"]["sampling"] = recorded_sampling(config.online.sampling)
        if not config.online.rollout_ahead:
            del settings["online"]["rollout_ahead"]
        if config.online.teacher_top_k is None:  # the teacher is loaded
            del settings["online"]["teacher_top_k"]
    return settings


def training_arguments(config: TrainConfig, precision: str, seed: int, directory: Path) -> TrainingArguments:
    """`config` for the Trainer, whose saved steps go to `directory`.

    Raises InputError for a batch size that micro-batches and processes do not divide, for an unknown tracker, and for
    an optimizer or quantised weights that do not work here.
    """
    _require_optimizer(config.optimizer)
    if config.quantize:
        _require_quantization()
    micro, processes = _micro_batch(config)
    evaluation = {
        "eval_strategy": "steps",
        "eval_steps": config.eval_steps,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_kl" if find_method(config.method).needs_teacher else "eval_cross_entropy",
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
        warmup_steps=config.warmup_ratio,  # below 1: a fraction of all steps
        lr_scheduler_type=config.schedule,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        optim=config.optimizer,
        bf16=precision == "bfloat16",
        ddp_find_unused_parameters=False,
        use_cpu=default_device() == "cpu",
        gradient_checkpointing=config.gradient_checkpointing,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_steps=config.eval_steps or config.save_steps,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=list(config.trackers),
        **(evaluation if config.eval_steps else {}),
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # never DataParallel: one process uses one GPU
    return arguments


def _micro_batch(config: TrainConfig) -> tuple[int, int]:
    """The responses of a micro-batch, and the processes that divide the optimizer batch into micro-batches.

    With `micro_batch_tokens` the whole optimizer batch counts as one, which the trainer packs.
    """
    if config.micro_batch_tokens:
        return config.batch_size, 1
    processes = world_size()
    micro = min(config.micro_batch_size or MICRO_BATCH_SIZE, config.batch_size // processes)
    if not micro or config.batch_size % (micro * processes):
        raise InputError(
            f"Micro-batches of {micro} in {processes} processes do not divide a batch of {config.batch_size}.",
            "Choose a --batch-size that is a multiple of --micro-batch-size times the number of processes.",
        )
    return micro, processes


def _require_trackers(names: Sequence[str]) -> None:
    try:
        for tracker in get_reporting_integration_callbacks(list(names)):
            tracker()
    except (ValueError, RuntimeError) as error:
        raise InputError(f"A tracker is not available ({error}).", "Install it, or leave out --tracker.") from None


def _require_optimizer(name: OptimizerName) -> None:
    optimizer = OPTIMIZERS[name]
    if optimizer.bitsandbytes:
        _require_bitsandbytes(f"--optimizer {name}")
    if optimizer.paged and default_device() == "cpu":
        raise InputError(
            f"--optimizer {name} pages the memory of a GPU, and there is none.", f"Choose {optimizer.unpaged}."
        )
    if not optimizer.sharded and shards_weights():
        sharded = " or ".join(other for other, properties in OPTIMIZERS.items() if properties.sharded)
        raise InputError(
            f"--optimizer {name} does not work on weights that FSDP shards.",
            f"Choose {sharded}, or configure accelerate without FSDP: each process then holds all weights.",
        )


def _require_quantization() -> None:
    _require_bitsandbytes("--quantize")
    if shards_weights():
        raise InputError(
            "FSDP cannot shard the quantised weights of --quantize.",
            "Leave out --quantize, or configure accelerate without FSDP: each process then holds all weights.",
        )


def _require_bitsandbytes(option: str) -> None:
    if find_spec("bitsandbytes") is None:
        raise InputError(
            f"{option} needs bitsandbytes, which is not installed.",
            f"Run `pip install 'tsdkd[bitsandbytes]'`, or leave out {option.split(maxsplit=1)[0]}.",
        )


def bitsandbytes_version(config: TrainConfig) -> dict[str, str]:
    """The version of bitsandbytes by name; empty where training does not use it, or refuses because it is missing."""
    used = OPTIMIZERS[config.optimizer].bitsandbytes or config.quantize
    return {"bitsandbytes": version("bitsandbytes")} if used and find_spec("bitsandbytes") else {}


@contextmanager
def reset_overrides(name: OptimizerName) -> Iterator[None]:
    """Reset bitsandbytes' list of the weights with float32 states before and after a run.

    bitsandbytes keeps the list for the whole process, by position in the optimizer: another model would get the entries
    of this one, and this one would stay in memory.
    """
    if not OPTIMIZERS[name].bitsandbytes:
        yield
        return
    from bitsandbytes.optim.optimizer import GlobalOptimManager

    manager = GlobalOptimManager.get_instance()  # type: ignore[no-untyped-call]
    manager.initialize()
    try:
        yield
    finally:
        manager.initialize()


def require_compiler(device: str) -> None:
    """Raise InputError when the compiler of --compile is missing: Triton and C on a GPU, C++ on a CPU."""
    if device == "cuda":
        if find_spec("triton") is None:
            raise InputError("--compile needs Triton on a GPU.", "Run `pip install triton`, or leave out --compile.")
        language, variable, compilers = "C", "CC", ["gcc", "clang"]
    else:
        language, variable, compilers = "C++", "CXX", ["g++"]
    compilers = [os.environ[variable]] if variable in os.environ else compilers
    if not any(map(shutil.which, compilers)):
        raise InputError(
            f"--compile needs a {language} compiler, and {' or '.join(compilers)} is not installed.",
            f"Install one, set {variable} to another, or leave out --compile.",
        )
