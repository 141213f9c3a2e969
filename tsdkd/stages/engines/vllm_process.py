"""The child process of the vLLM engine: it holds one `LLM` and replies to each message of its parent.

A child that samples gets requests with sampling parameters, or a `WeightCommand`. It sends the number of responses just
finished (int), the outputs of all requests (list, empty after a command), or an error (str). A child that reads is in
`vllm_reading.py`. Neither reads an artifact. Scheduling is synchronous and the prefix cache is emptied before
each message, so that a batch always gets the same responses.
"""

import atexit
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tsdkd.child_processes import follow_parent

ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1"}
"""Defaults; variables that the user has set win."""
LAUNCHER_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)
"""Variables of torchrun and accelerate, which vLLM must not see: it is no rank of the training run."""

TokenRequest = tuple[list[int], int]
"""Prompt ids and seed."""
Reply = Callable[[Connection, dict[str, Any], Path | None], None]
"""Loads an `LLM` with its arguments and adapter, reports that it is ready, and replies to messages forever."""


@dataclass(frozen=True, slots=True)
class WeightCommand:
    """One step of giving vLLM other weights, or of freeing its GPU memory; see `vllm_weights`."""

    name: str
    argument: Any


@dataclass(frozen=True, slots=True)
class EngineOutput:
    """One request as vLLM processed it."""

    prompt_ids: list[int]
    response_ids: list[int]
    log_probs: list[float]
    """Of each response token, after temperature and top-p; empty unless requested."""
    ended: bool
    """Whether an end token or a stop string ended the response, not its limit."""


def serve(
    pipe: Connection, arguments: dict[str, Any], adapter: Path | None, devices: str | None, log: Path, reply: Reply
) -> None:
    """Load an `LLM` and reply to messages until the parent ends."""
    follow_parent()
    signal.signal(signal.SIGTERM, end_process)
    _redirect_output(log)
    os.environ.update({name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()})
    for name in LAUNCHER_VARIABLES:
        os.environ.pop(name, None)
    if devices is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices
    try:
        reply(pipe, arguments, adapter)
    except Exception as error:  # the parent raises it
        traceback.print_exc()
        pipe.send((str(error).strip() or type(error).__name__).splitlines()[0])


def sample_and_reply(pipe: Connection, arguments: dict[str, Any], adapter: Path | None) -> None:
    """A `Reply` that samples responses and loads new weights."""
    from tqdm import tqdm
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    from tsdkd.stages.engines.vllm_weights import VllmWeights

    class ProgressToPipe(tqdm):
        def __init__(self, **settings: Any) -> None:
            super().__init__(**settings | {"disable": False})  # a disabled bar has no clock, which vLLM reads

        def update(self, n: int = 1) -> None:
            pipe.send(n)
            super().update(n)

    llm = LLM(**arguments)
    weights = VllmWeights(llm, LoRARequest("adapter", 1, str(adapter)) if adapter else None)
    pipe.send([])
    while True:
        message = pipe.recv()
        if isinstance(message, WeightCommand):
            getattr(weights, message.name)(message.argument)
            pipe.send([])
            continue
        llm.reset_prefix_cache()
        requests, sampling = message
        outputs = llm.generate(
            [{"prompt_token_ids": ids} for ids, _ in requests],
            [SamplingParams(seed=seed, **sampling) for _, seed in requests],
            lora_request=weights.lora,
            use_tqdm=lambda items=None, **settings: ProgressToPipe(**settings) if items is None else items,
        )
        pipe.send([_engine_output(output) for output in outputs])


def _engine_output(output: Any) -> EngineOutput:
    """A vLLM `RequestOutput` without vLLM's classes, which the parent cannot unpickle."""
    (completion,) = output.outputs
    ids = list(completion.token_ids)
    log_probs = [by_id[token].logprob for by_id, token in zip(completion.logprobs or [], ids, strict=False)]
    return EngineOutput(list(output.prompt_token_ids), ids, log_probs, completion.finish_reason == "stop")


def _redirect_output(log: Path) -> None:
    """Send stdout and stderr to a file, also those of compiled code."""
    with log.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)


def end_process(*_: object) -> None:
    """End without vLLM's tidying, which collects garbage for up to ten seconds, unless it ends processes of its own."""
    if not multiprocessing.active_children():
        atexit.register(os._exit, 0)  # the last that is registered runs first
    raise SystemExit
