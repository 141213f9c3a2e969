"""A real vLLM server of one model on loopback."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2

SETTINGS = {"TORCH_COMPILE_DISABLE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


class VllmServer:
    """Starts, kills and starts again; all at one address."""

    def __init__(self, model: str, log: Path, *options: str) -> None:
        """`options`: further ones of vLLM's server."""
        port = free_port()
        self.url, self._log = f"http://127.0.0.1:{port}", log
        self._command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
        self._command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
        self._command += ["--generation-config", "vllm", *options]

    def start(self) -> None:
        """Returns when the server responds."""
        with self._log.open("w") as file:
            self._process = subprocess.Popen(
                self._command, env=os.environ | SETTINGS, stdout=file, stderr=file, start_new_session=True
            )
        while not _responds(self.url):
            assert self._process.poll() is None, self._log.read_text()[-2000:]
            time.sleep(0.5)

    @property
    def pid(self) -> int:
        return self._process.pid

    def end(self, signal_: signal.Signals) -> None:
        """Send a signal to the server and its engine, and wait for its end."""
        os.killpg(self._process.pid, signal_)
        self._process.wait()


@contextmanager
def serve_vllm(model: str, log: Path, *options: str) -> Iterator[VllmServer]:
    server = VllmServer(model, log, *options)
    server.start()
    try:
        yield server
    finally:
        server.end(signal.SIGTERM)


def _responds(address: str) -> bool:
    try:
        return httpx2.get(f"{address}/health").is_success
    except httpx2.TransportError:
        return False
