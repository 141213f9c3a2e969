"""A teacher's server and its client, each in a process of its own that can be killed."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import httpx2
import numpy as np

from benchmarks.robustness.preload import PRELOADED
from tests.helpers.teacher_server import FakeServer, random_model, serve
from tests.helpers.vllm_server import free_port
from tsdkd.errors import TsdkdError
from tsdkd.stages.observer import Observer, SilentObserver
from tsdkd.stages.teacher_server import connection

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([*PRELOADED, "tsdkd.stages.score.served"])
VOCAB = 258
SECONDS_PER_REQUEST = 0.01
PATIENT, HASTY = 10, 3
"""Attempts of a request where the server comes back, and where it does not."""


class Server(Protocol):
    url: str

    def start(self) -> None: ...

    def end(self, signal_: signal.Signals) -> None: ...


class FakeTeacher:
    """The small server of the tests in a process of its own, always at one address."""

    def __init__(self) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        self._process = PROCESSES.Process(target=_serve_forever, args=(self.port,))
        self._process.start()
        while not _responds(self.url):
            time.sleep(0.01)

    def end(self, signal_: signal.Signals) -> None:
        assert self._process.pid
        os.kill(self._process.pid, signal_)
        self._process.join()


def _serve_forever(port: int) -> None:
    model = random_model(VOCAB)

    def slow(ids: list[int]) -> np.ndarray:
        time.sleep(SECONDS_PER_REQUEST)
        return model(ids)

    with serve(FakeServer(slow, max_logprobs=VOCAB), port):
        time.sleep(10**6)


def _responds(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/v1/models").is_success
    except httpx2.TransportError:
        return False


class Client:
    """A stage in a process of its own, which reports its progress."""

    def __init__(self, work: Callable[[Observer], object], log: Path, attempts: int = PATIENT) -> None:
        self.log = log
        self._progress, sender = PROCESSES.Pipe(duplex=False)
        self._process = PROCESSES.Process(target=_run, args=(work, sender, log, attempts))
        self._process.start()
        sender.close()

    def wait_for(self, units: int) -> None:
        """Return after this many responses or steps, or at the end of the process."""
        while units > 0:
            try:
                units -= self._progress.recv()
            except EOFError:
                return

    def kill(self) -> None:
        self._process.kill()

    def end(self) -> int:
        """The exit code, once the process has ended."""
        self.wait_for(10**6)
        self._process.join()
        assert self._process.exitcode is not None
        return self._process.exitcode


class ProgressObserver(SilentObserver):
    """Sends each advance of a progress bar, and prints messages."""

    def __init__(self, sender: Connection) -> None:
        self.sender = sender

    def info(self, message: str) -> None:
        print(message, flush=True)

    @contextmanager
    def progress(self, *_: Any) -> Iterator[Callable[[int], None]]:
        yield self.sender.send


def _run(work: Callable[[Observer], object], sender: Connection, log: Path, attempts: int) -> None:
    connection.ATTEMPTS = attempts
    with log.open("w") as file, redirect_stdout(file):
        try:
            work(ProgressObserver(sender))
        except TsdkdError as error:
            print(f"error: {error.cause} {error.remedy}")
            raise SystemExit(error.exit_code) from None
