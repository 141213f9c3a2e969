"""Workers in processes of this machine, each with GPUs of its own where there are any."""

import multiprocessing
import os
import pickle
from collections import deque
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from multiprocessing.connection import Connection, wait
from typing import Any, cast

import torch

from tsdkd.child_processes import follow_parent
from tsdkd.errors import InputError
from tsdkd.stages.observer import Observer
from tsdkd.stages.parallel.pool import Worker, WorkerLostError
from tsdkd.stages.parallel.tasks import OpenHandler, Outcome, WorkerRunner, unpack

CLOSED_PIPE = (EOFError, OSError)
"""Errors of a pipe whose other end has died: between messages, within one, or before it read one."""
SECONDS_TO_END = 10


class LocalProcesses:
    """Starts worker processes."""

    def __init__(self, count: int, gpus: int, observer: Observer) -> None:
        """`gpus`: GPUs per worker, if the machine has any. Raises InputError if it has too few."""
        self.count = count
        present = torch.cuda.device_count()
        if present and count * gpus > present:
            raise InputError(
                f"--data-parallel {count} needs {count * gpus} GPUs, and this machine shows {present}.",
                f"Give --data-parallel {present // gpus}." if present >= gpus else "Lower --tensor-parallel.",
            )
        names = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if present else []
        names = names if len(names) == present else [str(i) for i in range(present)]
        groups = [",".join(names[i * gpus : (i + 1) * gpus]) for i in range(count)]
        self._devices: list[str | None] = [*reversed(groups)] if present else [None] * count
        threads, cores = torch.get_num_threads(), len(os.sched_getaffinity(0))
        fitting = max(1, cores // count)
        if not present and threads > fitting:
            observer.info(
                f"{count} processes with {threads} threads each share {cores} cores. "
                f"OMP_NUM_THREADS={fitting} is faster; results may differ in rounding."
            )

    @staticmethod
    def pack(open_handler: OpenHandler) -> bytes:
        return pickle.dumps(open_handler)

    def start(self) -> Worker:
        return LocalWorker(self._devices.pop(), self._devices.append)

    @staticmethod
    def wait(workers: Collection[Worker]) -> Collection[Worker]:
        by_pipe = {cast("LocalWorker", worker).pipe: worker for worker in workers}
        return [by_pipe[cast("Connection", pipe)] for pipe in wait(list(by_pipe))]


class LocalWorker:
    """The driver's handle on one worker process."""

    ready = True

    def __init__(self, devices: str | None, release: Callable[[str | None], None]) -> None:
        """`devices`: CUDA_VISIBLE_DEVICES; None: as the driver's. `release`: receives them at the end."""
        self._release, self._devices = release, devices
        context = multiprocessing.get_context("spawn")
        self.pipe, child_pipe = context.Pipe()
        self.process = context.Process(target=_serve, args=(child_pipe, devices, torch.get_num_threads()))
        self.process.start()
        child_pipe.close()
        self._sender = ThreadPoolExecutor(1)
        """A thread that sends: a full pipe makes it wait until the worker reads, which it does between tasks."""

    def send(self, handler: bytes, task: Any) -> None:
        self._sender.submit(self._write, pickle.dumps((handler, task)))

    def _write(self, message: bytes) -> None:
        with suppress(*CLOSED_PIPE):  # `receive` raises
            self.pipe.send_bytes(message)

    def receive(self) -> int | Outcome:
        try:
            return cast("int | Outcome", self.pipe.recv())
        except CLOSED_PIPE:
            self.process.join(SECONDS_TO_END)
            raise WorkerLostError(f"process {self.process.pid}, status {self.process.exitcode}") from None

    def stop(self) -> None:
        self.process.terminate()
        self.process.join(SECONDS_TO_END)
        self.process.kill()
        self.process.join()
        self._sender.shutdown()
        self.pipe.close()
        self._release(self._devices)


def _serve(pipe: Connection, devices: str | None, threads: int) -> None:
    """Run tasks until the driver ends. A task that waits in the pipe runs before the last outcome is made.

    `threads`: of the driver; another number could change results in rounding.
    """
    follow_parent()
    if devices is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices
    torch.set_num_threads(threads)
    outcomes = deque[Callable[[], Outcome]]()
    with suppress(*CLOSED_PIPE), closing(WorkerRunner()) as runner:
        while True:
            if outcomes and (len(outcomes) > 1 or not pipe.poll()):
                pipe.send(outcomes.popleft()())
                continue
            handler, task = pickle.loads(pipe.recv_bytes())
            outcomes.append(runner.run(handler, unpack(handler), task, pipe.send))
