"""vLLM behind the `Engine` protocol: each copy of the model in a process of its own, whose death frees its GPU.

Within a process scheduling is synchronous and nothing is cached from part to part, so that a part always meets the
same batches, and gets the same responses. The parent knows no vLLM; its copies know no files.
"""

import multiprocessing
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Self, cast

from tsdkd.errors import TsdkdError
from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.data.requests import AnyRequestBatch, Request, Response
from tsdkd.stages.models.adapters import vllm_max_lora_rank
from tsdkd.stages.models.spec import ModelSpec
from tsdkd.stages.models.tokenizers import vocab_size

ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1"}


@dataclass(frozen=True, slots=True)
class CheckedResponse:
    """What an engine says it read and sampled, with the log-probabilities it sampled with."""

    prompt_ids: list[int]
    ids: list[int]
    logprobs: list[float]


TokenRequest = tuple[list[int], int]
"""Ids and seed."""


class VllmEngine:
    """One or more copies of a model, for sequences of up to `longest` tokens; use as a context."""

    def __init__(self, model: ModelSpec, config: GenerateConfig, longest: int) -> None:
        self.model, self.config = model, config
        self.arguments = _arguments(model, config, longest)
        self.sampling = {
            "temperature": config.temperature,
            "top_p": config.top_p if config.temperature > 0 else 1.0,
            "max_tokens": config.max_new_tokens,
            "stop_token_ids": model.end_ids,
            "detokenize": False,
        }
        self.copies: list[EngineProcess] = []

    def __enter__(self) -> Self:
        """Raises TsdkdError when vLLM cannot serve the model."""
        try:
            for rank in range(self.config.data_parallel):
                devices = _devices(rank, self.config.tensor_parallel) if self.config.data_parallel > 1 else None
                self.copies.append(EngineProcess(self.arguments, self.model.adapter, devices))
            for copy in self.copies:
                copy.result()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for copy in self.copies:
            copy.process.terminate()
        for copy in self.copies:
            copy.close()

    def sample(
        self, parts: Iterator[AnyRequestBatch], advance: Callable[[int], None]
    ) -> Iterator[tuple[AnyRequestBatch, list[Response]]]:
        working: dict[Connection, tuple[EngineProcess, AnyRequestBatch]] = {}
        free = list(self.copies)
        while True:
            while free and (part := next(parts, None)) is not None:
                copy = free.pop()
                copy.send(_requests(part.requests), self.sampling)
                working[copy.pipe] = copy, part
            if not working:
                return
            for pipe in cast("list[Connection]", wait(list(working))):
                copy, part = working.pop(pipe)
                said = copy.hear()
                if isinstance(said, int):
                    working[pipe] = copy, part
                    advance(said)
                    continue
                free.append(copy)
                yield part, [Response(one.ids) for one in said]

    def reload(self, weights: Path) -> None:
        """Take other weights, of the same model, from a directory."""
        for copy in self.copies:
            copy.pipe.send(weights)
        for copy in self.copies:
            copy.result()

    def check_responses(self, requests: list[Request], tokens: int) -> list[CheckedResponse]:
        """The first tokens of a few responses, from every copy of the model, with log-probabilities."""
        for copy in self.copies:
            copy.send(_requests(requests), self.sampling | {"max_tokens": tokens, "logprobs": 0})
        return [one for copy in self.copies for one in copy.result()]


class EngineProcess:
    """A process with one `LLM`."""

    def __init__(self, arguments: dict[str, Any], adapter: Path | None, devices: str | None) -> None:
        handle, log = tempfile.mkstemp(prefix="tsdkd-vllm-", suffix=".log")
        os.close(handle)
        self.log, self.failed = Path(log), False
        self.pipe, theirs = multiprocessing.get_context("spawn").Pipe()
        self.process = multiprocessing.get_context("spawn").Process(
            target=_serve, args=(theirs, arguments, adapter, devices, self.log)
        )
        self.process.start()
        theirs.close()

    def send(self, requests: list[TokenRequest], sampling: dict[str, Any]) -> None:
        self.pipe.send((requests, sampling))

    def hear(self) -> int | list[CheckedResponse]:
        """A count of responses just done, or the result; raises TsdkdError for a failure or a process that died."""
        try:
            said = self.pipe.recv()
        except EOFError:
            self.process.join()
            raise self._fail(f"its process ended with status {self.process.exitcode}") from None
        if isinstance(said, str):
            raise self._fail(said)
        return cast("int | list[CheckedResponse]", said)

    def result(self) -> list[CheckedResponse]:
        while isinstance(said := self.hear(), int):
            pass
        return said

    def close(self) -> None:
        """After `terminate`: wait for the process's end; the log stays where it tells of a failure."""
        self.process.join(10)
        self.process.kill()
        self.process.join()
        self.pipe.close()
        if not self.failed:
            self.log.unlink()

    def _fail(self, cause: str) -> TsdkdError:
        self.failed = True
        return _failure(cause, self.log)


def _requests(requests: list[Request]) -> list[TokenRequest]:
    return [(request.prompt_ids, request.seed) for request in requests]


def _arguments(model: ModelSpec, config: GenerateConfig, longest: int) -> dict[str, Any]:
    """What `LLM` is told."""
    arguments: dict[str, Any] = {
        "model": str(model.directory),
        "skip_tokenizer_init": True,
        "generation_config": "vllm",  # else the model's own top-k or penalty would leak in
        "logprobs_mode": "processed_logprobs",  # those it samples with
        "logits_processors": ["tsdkd.stages.engines.vllm_logits:MaskPaddingRows"],
        "additional_config": {"tsdkd_vocabulary": vocab_size(model.tokenizer)},
        "dtype": model.dtype if config.dtype == "auto" else config.dtype,  # vLLM's own auto halves float32
        "enable_chunked_prefill": False,  # a prompt read in pieces would use up random numbers; CPUs refuse
        "tensor_parallel_size": config.tensor_parallel,
        "gpu_memory_utilization": config.memory_fraction,
        "max_model_len": config.max_model_len or longest,
        "quantization": config.quantization,
    }
    if model.adapter:
        arguments |= {"enable_lora": True, "max_lora_rank": vllm_max_lora_rank(model.adapter)}
    return arguments


def _devices(copy: int, each: int) -> str:
    """The GPUs of one copy, out of those this process may see."""
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = allowed.split(",") if allowed else [str(i) for i in range((copy + 1) * each)]
    return ",".join(names[copy * each : (copy + 1) * each])


def _failure(cause: str, log: Path) -> TsdkdError:
    lowered = cause.lower()
    if any(word in lowered for word in ("memory", "kv cache", "status -9")):
        remedy = "Change --memory-fraction, lower --max-model-len, or raise --tensor-parallel"
    elif any(word in lowered for word in ("not supported", "unsupported", "architectures", "is not available")):
        remedy = "Sample with --engine transformers"
    else:
        remedy = "Sample with --engine transformers, or mend what the log tells of"
    return TsdkdError(f"vLLM failed: {cause.rstrip('.')}.", f"{remedy}; its log is {log}.")


def _serve(pipe: Connection, arguments: dict[str, Any], adapter: Path | None, devices: str | None, log: Path) -> None:
    """A copy's life: load, say so, then answer requests until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    signal.signal(signal.SIGTERM, _leave)
    threading.Thread(target=_follow_parent, daemon=True).start()
    with log.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.environ.update({name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()})
    if devices is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices
    try:
        from tqdm import tqdm
        from vllm import LLM, SamplingParams
        from vllm.lora.request import LoRARequest

        class Told(tqdm):
            def __init__(self, **settings: Any) -> None:
                super().__init__(**settings | {"disable": False})  # a disabled one knows no time, which vLLM asks for

            def update(self, n: int = 1) -> None:
                pipe.send(n)
                super().update(n)

        llm = LLM(**arguments)
        lora = LoRARequest("adapter", 1, str(adapter)) if adapter else None
        pipe.send([])
        while True:
            asked = pipe.recv()
            llm.reset_prefix_cache()
            if isinstance(asked, Path):
                llm.collective_rpc("reload_weights", kwargs={"weights_path": str(asked)})
                pipe.send([])
                continue
            requests, sampling = asked
            outputs = llm.generate(
                [{"prompt_token_ids": ids} for ids, _ in requests],
                [SamplingParams(seed=seed, **sampling) for _, seed in requests],
                lora_request=lora,
                use_tqdm=lambda rows=None, **settings: Told(**settings) if rows is None else rows,
            )
            pipe.send([_sung(output) for output in outputs])
    except Exception as error:  # whatever it was, the parent tells it
        import traceback

        traceback.print_exc()
        pipe.send((str(error).strip() or type(error).__name__).splitlines()[0])


def _sung(output: Any) -> CheckedResponse:
    (one,) = output.outputs
    ids = list(one.token_ids)
    logprobs = [at[token].logprob for at, token in zip(one.logprobs or [], ids, strict=False)]
    return CheckedResponse(list(output.prompt_token_ids), ids, logprobs)


def _leave(*_: object) -> None:
    raise SystemExit


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)
