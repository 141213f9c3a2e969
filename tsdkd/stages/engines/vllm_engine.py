"""The vLLM engine: it runs in a child process, whose end frees its GPU memory.

This module never imports vLLM: `vllm_process` does, in the child.
"""

import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor

from tsdkd.artifacts.disk import disk_failure
from tsdkd.errors import TsdkdError, first_line
from tsdkd.stages.config.generate import MEMORY_FRACTION, GenerateConfig
from tsdkd.stages.data.requests import AnyRequestBatch, Request, Response
from tsdkd.stages.engines.ends import finish_reason
from tsdkd.stages.engines.vllm_process import (
    EngineOutput,
    Reply,
    TokenRequest,
    WeightCommand,
    sample_and_reply,
    serve,
)
from tsdkd.stages.models.adapters import vllm_max_lora_rank
from tsdkd.stages.models.spec import ModelSpec

MASK_PADDING_ROWS = "tsdkd.stages.engines.vllm_logits:MaskPaddingRows"
"""vLLM's name of the logits processor, which reads `VOCAB_SIZE_KEY` from vLLM's `additional_config`."""
VOCAB_SIZE_KEY = "tsdkd_vocab_size"
CLOSED_PIPE = (EOFError, OSError)
"""What a pipe raises when its other end died: between messages, within one, or with one that it had not read."""
MEMORY_REMEDY = "Change --memory-fraction, lower --max-model-len, or raise --tensor-parallel"


class VllmEngine:
    """One model; a context manager."""

    def __init__(
        self,
        model: ModelSpec,
        config: GenerateConfig,
        max_tokens: int,
        more: dict[str, Any] | None = None,
        device: str | None = None,
    ) -> None:
        """`max_tokens`: the longest sequence, prompt and response together. `more`: further arguments of `LLM`.

        `device`: its GPU; None: all GPUs are visible to it.
        """
        self.model, self.config, self.device = model, config, device
        self.arguments = llm_arguments(model, config, max_tokens) | (more or {})
        self.sampling = sampling_parameters(model, config)

    def __enter__(self) -> Self:
        """Start the process. Raises TsdkdError when vLLM cannot serve the model."""
        self.process = EngineProcess(self.arguments, self.model.adapter, self.device)
        try:
            self.process.receive_outputs()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.close()

    def sample(
        self, batches: Iterator[AnyRequestBatch], advance: Callable[[int], None]
    ) -> Iterator[tuple[AnyRequestBatch, list[Response]]]:
        for batch in batches:
            self.process.send_requests(batch.requests, self.sampling)
            while isinstance(message := self.process.receive(), int):
                advance(message)
            yield batch, [response_of(output, self.config) for output in message]

    def load(self, directory: Path) -> None:
        """Replace the weights by those of safetensors files."""
        self._command(WeightCommand("load", directory))

    def load_adapter(self, directory: Path) -> None:
        """Replace the adapter."""
        self._command(WeightCommand("load_adapter", directory))

    def sleep(self, level: int) -> None:
        """Free the GPU's memory until the next load; see `VllmWeights.sleep`."""
        self._command(WeightCommand("sleep", level))

    def _command(self, command: WeightCommand) -> None:
        self.process.send(command)
        self.process.receive_outputs()

    def sample_with_log_probs(self, requests: list[Request], max_new_tokens: int) -> list[EngineOutput]:
        """Sample the start of each response with its log-probabilities."""
        self.process.send_requests(requests, self.sampling | {"max_tokens": max_new_tokens, "logprobs": 0})
        return self.process.receive_outputs()


class EngineProcess:
    """The parent's handle on one child process, which `reply` runs in."""

    def __init__(
        self,
        arguments: dict[str, Any],
        adapter: Path | None = None,
        devices: str | None = None,
        reply: Reply = sample_and_reply,
        memory_remedy: str = MEMORY_REMEDY,
    ) -> None:
        self._memory_remedy = memory_remedy
        handle, log = tempfile.mkstemp(prefix="tsdkd-vllm-", suffix=".log")
        os.close(handle)
        self._log, self._failed = Path(log), False
        context = multiprocessing.get_context("spawn")
        self.pipe, child_pipe = context.Pipe()
        self._process = context.Process(target=serve, args=(child_pipe, arguments, adapter, devices, self._log, reply))
        self._process.start()
        child_pipe.close()

    def send_requests(self, requests: list[Request], sampling: dict[str, Any]) -> None:
        tokens: list[TokenRequest] = [(request.prompt_ids, request.seed) for request in requests]
        self.send((tokens, sampling))

    def send(self, message: Any) -> None:
        """Raises TsdkdError when vLLM failed or died."""
        try:
            self.pipe.send(message)
        except CLOSED_PIPE:
            self.receive()  # the error that ended the process
            raise

    def receive(self) -> int | list[EngineOutput]:
        """The number of responses just finished, or all outputs. Raises TsdkdError when vLLM failed or died."""
        try:
            message = self.pipe.recv()
        except CLOSED_PIPE:
            raise self._death() from None
        if isinstance(message, str):
            raise self._failure(message)
        return cast("int | list[EngineOutput]", message)

    def receive_outputs(self) -> list[EngineOutput]:
        """All outputs; drops the counts before them."""
        while isinstance(message := self.receive(), int):
            pass
        return message

    def receive_tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor that the child sent as bytes. Raises TsdkdError when vLLM died."""
        tensor = torch.empty(shape, dtype=dtype)
        try:
            self.pipe.recv_bytes_into(tensor.flatten().view(torch.uint8).numpy())
        except CLOSED_PIPE:
            raise self._death() from None
        return tensor

    def terminate(self) -> None:
        self._process.terminate()

    def close(self) -> None:
        """Wait for the end of a terminated process; delete its log unless it failed."""
        self._process.join(10)
        self._process.kill()
        self._process.join()
        self.pipe.close()
        if not self._failed:
            self._log.unlink()

    def _death(self) -> TsdkdError:
        self._process.join()
        return self._failure(f"its process ended with status {self._process.exitcode}")

    def _failure(self, cause: str) -> TsdkdError:
        self._failed = True
        return TsdkdError(
            f"vLLM failed: {cause.rstrip('.')}.", f"{_remedy(cause, self._memory_remedy)}; its log is {self._log}."
        )


def response_of(output: EngineOutput, config: GenerateConfig) -> Response:
    reason = finish_reason(config, ended=output.ended)
    return Response(output.response_ids, reason, log_probs=output.log_probs or None)


def sampling_parameters(model: ModelSpec, config: GenerateConfig) -> dict[str, Any]:
    """The arguments of vLLM's `SamplingParams`, without the seed."""
    return {
        "temperature": config.temperature,
        "top_p": config.top_p if config.temperature > 0 else 1.0,
        "max_tokens": config.response_limit,
        "stop_token_ids": model.end_ids,
        "detokenize": bool(config.stop),
        "stop": list(config.stop),
        "include_stop_str_in_output": bool(config.stop),
        "skip_special_tokens": False,  # a stop string may contain them
    }


def llm_arguments(model: ModelSpec, config: GenerateConfig, max_tokens: int) -> dict[str, Any]:
    """The arguments of vLLM's `LLM`."""
    arguments: dict[str, Any] = {
        "model": str(model.directory),
        "skip_tokenizer_init": not config.stop,
        "tokenizer": model.tokenizer.name_or_path if config.stop else None,
        "trust_remote_code": False,
        "generation_config": "vllm",  # not the model's own, which may set top-k or a repetition penalty
        "logprobs_mode": "processed_logprobs",  # after temperature and top-p, as the engine check compares them
        "logits_processors": [MASK_PADDING_ROWS],
        "additional_config": {VOCAB_SIZE_KEY: model.vocab},
        "dtype": model.resolve_dtype(config.dtype),
        "enable_chunked_prefill": False,  # a prompt read in chunks draws random numbers; CPUs do not support it
        "tensor_parallel_size": config.tensor_parallel,
        "gpu_memory_utilization": MEMORY_FRACTION if config.memory_fraction is None else config.memory_fraction,
        "max_model_len": config.max_model_len or max_tokens,
        "quantization": config.quantization,
    }
    if model.adapter:
        arguments |= {"enable_lora": True, "max_lora_rank": vllm_max_lora_rank(model.adapter)}
    return arguments


@contextmanager
def translate_vllm_errors() -> Iterator[None]:
    """Turn the errors of vLLM in this process, which have many types, into TsdkdError."""
    try:
        yield
    except TsdkdError:
        raise
    except Exception as error:
        cause = first_line(error)
        if failure := disk_failure(error):
            raise failure from error
        raise TsdkdError(
            f"vLLM failed: {cause.rstrip('.')}.", f"{_remedy(cause)}; --debug shows a traceback."
        ) from error


def _remedy(cause: str, memory_remedy: str = MEMORY_REMEDY) -> str:
    cause = cause.lower()
    if any(words in cause for words in ("memory", "kv cache", "status -9")):
        return memory_remedy
    if any(words in cause for words in ("not supported", "unsupported", "architectures", "is not available")):
        return "Use --engine transformers"
    return "Use --engine transformers, or fix the error in the log"
