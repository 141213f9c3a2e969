"""vLLM behind a server on this machine, which samples for the ranks of a training run and takes the student's weights.

Prompts and responses travel as ids (/inference/v1/generate). Weights and adapters are read from a directory that both
processes see: by /collective_rpc, a route of vLLM's development mode, and by /v1/load_lora_adapter.
"""

import json
import shlex
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tsdkd.errors import InputError, TsdkdError
from tsdkd.processes import local_rank
from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.data.requests import AnyRequestBatch, Request, Response
from tsdkd.stages.engines.vllm_engine import (
    MASK_PADDING_ROWS,
    VOCAB_SIZE_KEY,
    llm_arguments,
    response_of,
    sampling_parameters,
)
from tsdkd.stages.engines.vllm_process import EngineOutput
from tsdkd.stages.models.spec import ModelSpec
from tsdkd.stages.teacher_server.connection import Connection, Json, RefusedError, ServerKind

ROLLOUT_SERVER = ServerKind("rollout server", "--rollout-url", "TSDKD_ROLLOUT_API_KEY", repeats=False)
"""No request is repeated: a server that was started again would sample with its first weights."""
REQUESTS = 64
"""Requests that one rank sends at the same time."""
ENVIRONMENT = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
"""Variables of the server, which open its routes for weights and adapters."""
MODULE = "vllm.entrypoints.openai.api_server"


def server_options(student: ModelSpec, config: GenerateConfig, max_tokens: int, more: dict[str, Any]) -> list[str]:
    """The options of vLLM's server that make it sample as the engine does; see `VllmEngine` for `more`."""
    arguments = llm_arguments(student, config, max_tokens) | more
    options = ["--enable-scale-out"]
    for name, value in arguments.items():
        option = name.replace("_", "-")
        if name in {"skip_tokenizer_init", "trust_remote_code"} or value is None:
            continue
        if isinstance(value, bool):
            options.append(f"--{option}" if value else f"--no-{option}")
        else:
            options += [f"--{option}", *([json.dumps(value)] if isinstance(value, dict) else _words(value))]
    return options


def _words(value: Any) -> list[str]:
    return [str(each) for each in value] if isinstance(value, list) else [str(value)]


class ServedEngine:
    """One model for all ranks of a machine. A context manager; `sample` may be called by one thread."""

    def __init__(
        self, url: str, student: ModelSpec, config: GenerateConfig, max_tokens: int, more: dict[str, Any]
    ) -> None:
        """Arguments as for `VllmEngine`.

        Raises InputError for a server on another machine, without the routes for weights, or with other settings of
        sampling; the remedy is the command that starts the right server.
        """
        self.config = config
        self.sampling = sampling_parameters(student, config)
        self._connection = Connection(url, REQUESTS, ROLLOUT_SERVER)
        self._threads = ThreadPoolExecutor(REQUESTS)
        self._loads = 0
        self._adapter: str | None = None
        try:
            _require_loopback(self._connection)
            options = server_options(student, config, max_tokens, more)
            variables = " ".join(f"{name}={value}" for name, value in ENVIRONMENT.items())
            port = urlsplit(self._connection.url).port or 80
            command = shlex.join(["python", "-m", MODULE, "--host", "127.0.0.1", "--port", str(port), *options])
            self._remedy = f"Start it with: {variables} {command}"
            self._model = self._find_model(student, max_tokens, more, self._remedy)
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> "ServedEngine":
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        self._threads.shutdown(cancel_futures=True)

    def sample(
        self, batches: Iterator[AnyRequestBatch], advance: Callable[[int], None]
    ) -> Iterator[tuple[AnyRequestBatch, list[Response]]]:
        for batch in batches:
            responses = []
            for output in self._generate(batch.requests, self.sampling, "responses"):
                responses.append(response_of(output, self.config))
                advance(1)
            yield batch, responses

    def sample_with_log_probs(self, requests: list[Request], max_new_tokens: int) -> list[EngineOutput]:
        """Sample the start of each response with its log-probabilities."""
        sampling = self.sampling | {"max_tokens": max_new_tokens, "logprobs": 0}
        return list(self._generate(requests, sampling, "check"))

    def load(self, directory: Path) -> None:
        """Replace the weights by those of safetensors files: the machine's first rank tells the server.

        Raises TsdkdError where the server cannot read them.
        """
        if local_rank() == 0:
            body = {"method": "reload_weights", "kwargs": {"weights_path": str(directory)}}
            try:
                self._connection.command("/collective_rpc", body)
            except RefusedError as error:  # such as a server of another model
                raise TsdkdError(error.cause, self._remedy) from None
            self._connection.command("/reset_prefix_cache")

    def load_adapter(self, directory: Path) -> None:
        """Sample with the adapter of a directory, which the machine's first rank gives to the server.

        Each adapter has a new name: the server would read one that it reloads in place again for each batch.
        """
        before, self._loads = self._adapter, self._loads + 1
        self._adapter = f"{directory.name}-{self._loads}"
        if local_rank() == 0:
            body = {"lora_name": self._adapter, "lora_path": str(directory)}
            self._connection.command("/v1/load_lora_adapter", body)
            with suppress(RefusedError):  # a server that was started again does not know it
                if before:
                    self._connection.command("/v1/unload_lora_adapter", {"lora_name": before})

    def _generate(self, requests: list[Request], sampling: dict[str, Any], purpose: str) -> Iterator[EngineOutput]:
        futures: list[Future[EngineOutput]] = [
            self._threads.submit(self._generate_one, request, sampling, purpose) for request in requests
        ]
        try:
            for future in futures:
                yield future.result()
        finally:
            for future in futures:
                future.cancel()

    def _generate_one(self, request: Request, sampling: dict[str, Any], purpose: str) -> EngineOutput:
        body: Json = {
            "model": self._adapter or self._model,
            "token_ids": request.prompt_ids,
            "return_token_ids": True,
            "cache_salt": f"{request.sample_id} {request.seed} {purpose}",  # no prefix of other requests
            "sampling_params": sampling | {"seed": request.seed},
        }
        answer = self._connection.post("/inference/v1/generate", body)
        try:
            (choice,) = answer["choices"]
            ids, content = list(choice["token_ids"]), (choice.get("logprobs") or {}).get("content") or []
            log_probs = [float(token["logprob"]) for token in content]
            return EngineOutput(list(answer["prompt_token_ids"]), ids, log_probs, choice["finish_reason"] == "stop")
        except (KeyError, TypeError, ValueError):
            raise TsdkdError(
                f"The rollout server at {self._connection.url} answers in another form than vLLM.",
                "Serve with the version of vLLM that tsdkd supports.",
            ) from None

    def _find_model(self, student: ModelSpec, max_tokens: int, more: dict[str, Any], remedy: str) -> str:
        """The model's name at the server. Raises InputError if the server samples otherwise than the engine would."""
        url = self._connection.url
        try:
            name = str(self._connection.get("/v1/models")["data"][0]["id"])
            info = self._connection.get("/server_info?config_format=json")["vllm_config"]
            faults = self._find_faults(info, student, max_tokens, more)
        except RefusedError as error:
            if error.status in {401, 403}:
                raise
            raise InputError(f"The rollout server at {url} has no routes for weights.", remedy) from None
        except InputError as error:
            raise InputError(error.cause, remedy) from None
        except (TsdkdError, AttributeError, IndexError, KeyError, TypeError):
            raise InputError(f"The server at {url} answers in another form than vLLM.", remedy) from None
        if faults:
            raise InputError(f"The rollout server at {url} {', '.join(faults)}.", remedy)
        return name

    def _find_faults(self, info: Json, student: ModelSpec, max_tokens: int, more: dict[str, Any]) -> list[str]:
        """The settings in which a server differs from the engine. `info`: vLLM's configuration at the server."""
        model, lora = info["model_config"], info.get("lora_config") or {}
        dtype = str(student.resolve_dtype(self.config.dtype))
        wrong = {
            f"computes in {model['dtype']}, not {dtype}": not str(model["dtype"]).endswith(dtype),
            f"reads {model['max_model_len']} tokens, not {max_tokens}": model["max_model_len"] < max_tokens,
            "returns log-probabilities before temperature and top-p": model["logprobs_mode"] != "processed_logprobs",
            "samples ids that the models do not share": MASK_PADDING_ROWS not in (model["logits_processors"] or ())
            or info["additional_config"].get(VOCAB_SIZE_KEY) != student.vocab,
            "reads prompts in chunks": info["scheduler_config"]["enable_chunked_prefill"],
            f"takes no LoRA adapters of rank {more.get('max_lora_rank', 0)}": (lora.get("max_lora_rank") or 0)
            < more.get("max_lora_rank", 0),
        }
        return [fault for fault, found in wrong.items() if found]


def _require_loopback(connection: Connection) -> None:
    if not connection.on_loopback:
        raise InputError(
            f"--rollout-url names {urlsplit(connection.url).hostname}: weights are sent through loopback alone.",
            "Start vLLM on this machine, and give http://127.0.0.1:PORT.",
        )
