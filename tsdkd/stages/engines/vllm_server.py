"""Starts a vLLM server on GPUs of its own; the server ends with rank 0."""

import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx2

from tsdkd.errors import TsdkdError
from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.engines.vllm_process import ENVIRONMENT as QUIET
from tsdkd.stages.engines.vllm_process import LAUNCHER_VARIABLES
from tsdkd.stages.engines.vllm_served import ENVIRONMENT, MODULE, server_options
from tsdkd.stages.models.spec import ModelSpec

POLL_SECONDS = 0.5


@contextmanager
def rollout_server(
    student: ModelSpec, config: GenerateConfig, max_tokens: int, more: dict[str, Any], devices: str | None
) -> Iterator[str]:
    """The URL of a server that is ready. Arguments as for `VllmEngine`; `devices`: its `CUDA_VISIBLE_DEVICES`.

    Raises TsdkdError when vLLM cannot serve the model.
    """
    handle, name = tempfile.mkstemp(prefix="tsdkd-vllm-server-", suffix=".log")
    os.close(handle)
    log, url = Path(name), f"http://127.0.0.1:{(port := _free_port())}"
    options = ["--host", "127.0.0.1", "--port", str(port), *server_options(student, config, max_tokens, more)]
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=(options, devices, log))
    process.start()
    assert process.pid is not None
    try:
        while not _is_ready(url):
            if not process.is_alive():
                raise TsdkdError(
                    f"vLLM's server ended with status {process.exitcode}.",
                    f"Leave out --rollout-gpus, or fix the error in its log, {log}.",
                )
            time.sleep(POLL_SECONDS)
        yield url
        log.unlink()
    finally:
        process.terminate()
        process.join(10)
        with suppress(ProcessLookupError):  # no engine is left
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()


def _serve(options: list[str], devices: str | None, log: Path) -> None:
    """Run the server in a process group that ends with the parent."""
    os.setsid()
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_group_after, args=(parent,), daemon=True).start()
    with log.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.environ.update(ENVIRONMENT | {name: os.environ.get(name, value) for name, value in QUIET.items()})
    del os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"]
    for variable in LAUNCHER_VARIABLES:
        os.environ.pop(variable, None)
    if devices is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices
    sys.argv = [MODULE, *options]
    runpy.run_module(MODULE, run_name="__main__", alter_sys=True)


def _end_group_after(parent: Any) -> None:
    parent.join()
    os.killpg(os.getpgrp(), signal.SIGKILL)


def _is_ready(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/health").is_success
    except httpx2.TransportError:
        return False


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])
