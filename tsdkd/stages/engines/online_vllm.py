"""Sampling during online training with vLLM, which gets the student's weights before each batch.

Each training process has an engine of its own on its GPU, or all processes of a machine share a server.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from tsdkd.errors import InputError
from tsdkd.processes import local_rank, local_world_size, rank, world_size
from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.config.train import LoRAConfig, OnlineConfig
from tsdkd.stages.data.requests import Request, Response
from tsdkd.stages.engines.engine_check import CHECKED_RESPONSES, disagreement, find_mismatch
from tsdkd.stages.engines.online import sample_requests
from tsdkd.stages.engines.vllm_engine import VllmEngine
from tsdkd.stages.engines.vllm_served import ServedEngine
from tsdkd.stages.engines.vllm_server import rollout_server
from tsdkd.stages.engines.weight_files import (
    delete_files,
    machine_directory,
    weight_bytes,
    write_adapter,
    write_weights,
)
from tsdkd.stages.models.adaptable import base_with_adapters
from tsdkd.stages.models.adapters import VLLM_LORA_RANKS
from tsdkd.stages.models.distributed import gather, wait_for_all_ranks
from tsdkd.stages.models.language_model import LanguageModel
from tsdkd.stages.models.spec import ModelSpec, load_config
from tsdkd.stages.observer import Observer


class VllmSampler:
    """Samples responses of the current student; each update of the weights is followed by an engine check."""

    def __init__(
        self,
        engine: VllmEngine | ServedEngine,
        sampling: GenerateConfig,
        directory: Path,
        *,
        adapter: bool,
        has_base: bool = True,
        sleeps: bool = False,
        log_probs: bool = False,
    ) -> None:
        """`directory`: receives this machine's weight files. `adapter`: the engine gets only the student's adapter.

        `has_base`: the engine has loaded the student; otherwise it gets the base model before the first adapter.
        `sleeps`: it frees its GPU's memory between two batches. `log_probs`: responses get log-probabilities.
        """
        if log_probs:
            engine.sampling |= {"logprobs": 0}  # of the sampled token alone
        self.engine, self.sampling, self.directory = engine, sampling, directory
        self.adapter, self.has_base, self.sleeps = adapter, has_base, sleeps
        self.update_seconds: list[float] = []
        self.check_seconds: list[float] = []

    def update(self, student: LanguageModel, requests: list[Request]) -> None:
        """Raises TsdkdError, on all ranks, when an engine's weights differ from the student's."""
        start = time.perf_counter()
        self._give_weights(student.model)
        given = time.perf_counter()
        self._check(student, requests)
        self.update_seconds.append(given - start)
        self.check_seconds.append(time.perf_counter() - given)

    def sample(self, requests: list[Request]) -> list[Response]:
        responses = sample_requests(self.engine, requests) if requests else []
        if self.sleeps and isinstance(self.engine, VllmEngine):
            self.engine.sleep(1 if self.adapter else 2)
        return responses

    def _give_weights(self, model: Any) -> None:
        dtype = getattr(torch, self.sampling.dtype)
        if not (self.adapter and self.has_base):
            write_weights(model, dtype, self.directory, merge=not self.adapter)
            self._load(self.engine.load)
            self.has_base = True
        if self.adapter and hasattr(base_with_adapters(model), "peft_config"):  # held-out responses come before it
            write_adapter(model, dtype, self.directory)
            self._load(self.engine.load_adapter)

    def _load(self, load: Callable[[Path], None]) -> None:
        wait_for_all_ranks()  # the files are whole
        load(self.directory)
        wait_for_all_ranks()
        delete_files(self.directory)

    def _check(self, student: LanguageModel, requests: list[Request]) -> None:
        """All ranks check the same requests: a sharded student needs equally many forwards on each rank."""
        checked = gather(requests[:CHECKED_RESPONSES])[:CHECKED_RESPONSES]
        if not checked:
            return
        mismatch = find_mismatch(self.engine, checked, student, self.sampling, self.sampling.dtype)
        for found in filter(None, gather([mismatch])):
            raise disagreement(student.name, *found)


def lora_arguments(student: ModelSpec, lora: LoRAConfig | None) -> dict[str, Any]:
    """vLLM's arguments for the adapters that a student will get; empty where it gets merged weights instead.

    vLLM serves no adapter on the head, and none above its largest rank.
    """
    if lora is None or lora.rank > VLLM_LORA_RANKS[-1]:
        return {}
    if lora.targets != "all-linear":
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(load_config(student.name), trust_remote_code=False)
        head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
        if head.rpartition(".")[2] in {name.strip() for name in lora.targets.split(",")}:
            return {}
    return {"enable_lora": True, "max_lora_rank": next(most for most in VLLM_LORA_RANKS if lora.rank <= most)}


def require_rollout_gpus(count: int) -> list[str]:
    """The names of `count` GPUs that no training process uses. Raises InputError if there are too few."""
    if world_size() > local_world_size():
        raise InputError(
            "--rollout-gpus works on one machine.", "Start a server on each machine, and give --rollout-url."
        )
    found, training = gpu_names(), local_world_size()
    names = found[training:]
    if len(names) < count:
        raise InputError(
            f"--rollout-gpus is {count}; of {len(found)} GPUs, training takes {training}.",
            "Lower it, or start fewer training processes.",
        )
    return names[:count]


def gpu_names() -> list[str]:
    """This machine's visible GPUs as `CUDA_VISIBLE_DEVICES` names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]


@contextmanager
def open_vllm_sampler(
    student: ModelSpec,
    learner: LanguageModel,
    online: OnlineConfig,
    lora: LoRAConfig | None,
    max_tokens: int,
    observer: Observer,
) -> Iterator[VllmSampler]:
    """vLLM for sequences of up to `max_tokens`, in the precision `sampling.dtype`; all ranks call it together.

    It samples ids below `student.vocab` alone, which the teacher knows too, and ends with `student.end_ids`. `learner`
    is the student in memory. Raises InputError for a server that does not fit, TsdkdError when vLLM cannot serve the
    model.
    """
    sampling = replace(online.sampling, memory_fraction=online.memory_fraction)
    more = lora_arguments(student, lora)
    with ExitStack() as stack:
        needed = weight_bytes(learner.model, getattr(torch, sampling.dtype))
        directory = stack.enter_context(machine_directory(needed))
        observer.info(f"{'Adapters' if more else 'Weights'} reach vLLM through {directory.parent}.")
        sleeps = online.rollout_url is None and online.rollout_gpus is None and torch.cuda.is_available()
        engine: VllmEngine | ServedEngine
        if online.rollout_gpus:
            url = _start_server(stack, student, sampling, max_tokens, more, require_rollout_gpus(online.rollout_gpus))
            engine = stack.enter_context(ServedEngine(url, student, sampling, max_tokens, more))
        elif online.rollout_url:
            engine = stack.enter_context(ServedEngine(online.rollout_url, student, sampling, max_tokens, more))
        else:
            more |= {"enable_sleep_mode": True} if sleeps else {}
            device = gpu_names()[local_rank()] if torch.cuda.is_available() and world_size() > 1 else None
            engine = stack.enter_context(VllmEngine(student, sampling, max_tokens, more, device))
        adapter, has_base = "enable_lora" in more, online.rollout_url is None
        sampler = VllmSampler(
            engine,
            sampling,
            directory,
            adapter=adapter,
            has_base=has_base,
            sleeps=sleeps,
            log_probs=bool(online.rollout_ahead),
        )
        yield sampler
        _report(sampler, observer)


def _start_server(
    stack: ExitStack,
    student: ModelSpec,
    sampling: GenerateConfig,
    max_tokens: int,
    more: dict[str, Any],
    gpus: list[str],
) -> str:
    """The URL of the server that rank 0 starts."""
    if rank():
        return gather([""])[0]
    copies = {"data_parallel_size": len(gpus)}
    url = stack.enter_context(rollout_server(student, sampling, max_tokens, more | copies, ",".join(gpus)))
    return gather([url])[0]


def _report(sampler: VllmSampler, observer: Observer) -> None:
    updates, checks = sampler.update_seconds, sampler.check_seconds
    if updates:
        observer.info(
            f"vLLM got the student's weights {len(updates)} times, in {_mean_and_most(updates)} each; the engine check "
            f"took {_mean_and_most(checks)}."
        )


def _mean_and_most(seconds: list[float]) -> str:
    return f"{sum(seconds) / len(seconds):.2f} s (at most {max(seconds):.2f} s)"
