"""Workers on a Ray cluster: each is an actor that keeps its resources, and so its GPUs and loaded models.

Ray places the actors and notices their loss. Tasks of Ray would not do: a process that is used again by a task with
another GPU keeps its first one, so Ray ends each process after a task with a GPU, and the models would be loaded again.
"""

import math
import os
import pickle
import socket
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch

from tsdkd.artifacts.manifest import ModelRecord
from tsdkd.errors import InputError, first_line
from tsdkd.stages.models.record import library_versions, model_record
from tsdkd.stages.observer import Observer
from tsdkd.stages.parallel.pool import Worker, WorkerLostError
from tsdkd.stages.parallel.tasks import OpenHandler, Outcome, WorkerRunner, unpack

AUTO = "auto"
"""The value of `--ray` without an address."""
NOTICE_SECONDS = 30.0
"""Seconds without a worker after which a message says what the run waits for."""
POLL_SECONDS = 1.0
"""Seconds between requests for the progress of tasks."""
ANSWER_SECONDS = 5.0
"""Ray itself waits two minutes for an address, and then ends the process."""


def require_ray() -> None:
    """Raises InputError where Ray is not installed."""
    if find_spec("ray") is None:
        raise InputError("Ray is not installed.", "Run `pip install 'tsdkd[ray]'`, or leave out --ray.")


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Join a cluster, and leave it afterwards; a cluster that is already joined stays joined.

    `address`: "auto" joins that of RAY_ADDRESS or of this machine, and starts one without either. Raises InputError.
    """
    import ray

    address = os.environ.get("RAY_ADDRESS") or AUTO if address == AUTO else address
    if address.startswith("ray://"):
        raise InputError(
            f"--ray {address} names a Ray Client server.", "Run the command on a node of the cluster, with --ray alone."
        )
    if ray.is_initialized():
        yield
        return
    try:
        _require_answer(address)
        ray.init(address=None if address == AUTO else address, log_to_driver=False, logging_level="ERROR")
    except Exception as error:  # of several types: no cluster, other versions, a wrong token
        raise InputError(
            f"The Ray cluster {address} cannot be joined ({first_line(error)}).",
            "Check the address with `ray status`; `ray stop` forgets a cluster of this machine that has ended.",
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _require_answer(address: str) -> None:
    """Raises OSError or ValueError for a cluster that does not answer."""
    from ray._private.services import canonicalize_bootstrap_address  # as `ray.init` finds it

    found = canonicalize_bootstrap_address(None if address == AUTO else address)
    if found is not None:
        host, _, port = found.rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_SECONDS).close()


class RayCluster:
    """Starts actors on the cluster that this process has joined."""

    def __init__(self, count: int | None, gpus: int, models: Sequence[ModelRecord], observer: Observer) -> None:
        """`count`: workers; None: as many as the cluster has resources for. `gpus`: GPUs per worker, if nodes have any.
        `models`: the models that each node needs.

        A worker without a GPU has as many CPUs as this process has threads. Raises InputError if no node has them.
        """
        import ray

        self._observer, self._models = observer, models
        self._notice_time = time.monotonic() + NOTICE_SECONDS
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        has_gpus = any(node.get("GPU") for node in nodes)
        self.needs = {"GPU": gpus, "CPU": 1} if has_gpus else {"CPU": torch.get_num_threads()}
        fitting = sum(int(min(node.get(name, 0) // need for name, need in self.needs.items())) for node in nodes)
        if not fitting:
            option = "--tensor-parallel" if has_gpus else "OMP_NUM_THREADS"
            raise InputError(
                f"No node of the Ray cluster has {self._in_words(self.needs)}; the largest has "
                f"{self._in_words(max(nodes, key=lambda node: [node.get(name, 0) for name in self.needs]))}.",
                f"Lower {option}, or add such a node first.",
            )
        self.count = count or fitting
        self._actor = ray.remote(max_concurrency=3, max_restarts=0)(RayProcess).options(
            num_cpus=self.needs["CPU"],
            num_gpus=self.needs.get("GPU", 0),
            scheduling_strategy="SPREAD",
            runtime_env={"env_vars": {"OMP_NUM_THREADS": str(torch.get_num_threads())}},
        )

    def _in_words(self, resources: Mapping[str, float]) -> str:
        return " and ".join(f"{resources.get(name, 0):g} {name}s" for name in self.needs)

    @staticmethod
    def pack(open_handler: OpenHandler) -> Any:
        import ray

        return ray.put(pickle.dumps(open_handler))

    def start(self) -> Worker:
        return RayWorker(self._actor.remote(Path.cwd()), self._models)

    def wait(self, workers: Collection[Worker]) -> Collection[Worker]:
        import ray

        own = [cast("RayWorker", worker) for worker in workers]
        by_ref = {worker.pending[0]: worker for worker in own if worker.pending}
        done, _ = ray.wait(list(by_ref), timeout=POLL_SECONDS, fetch_local=False)
        if done:
            return [by_ref[ref] for ref in done]
        busy = [worker for worker in own if worker.ready and worker.pending]
        if not busy and time.monotonic() > self._notice_time:
            self._notice_time = math.inf
            free = ray.available_resources()
            self._observer.info(
                f"Waiting for the Ray cluster: a worker needs {self._in_words(self.needs)}, and {self._in_words(free)} "
                "are free on all nodes together."
            )
        asked = {worker.ask_progress(): worker for worker in busy}
        answered = ray.wait(list(asked), num_returns=len(asked), timeout=POLL_SECONDS)[0] if asked else []
        return [asked[ref] for ref in answered if asked[ref].has_advanced(ref)]


class RayWorker:
    """The driver's handle on an actor."""

    def __init__(self, actor: Any, models: Sequence[ModelRecord]) -> None:
        self._actor, self.ready, self._advanced = actor, False, 0
        self.pending = [actor.check.remote(socket.gethostname(), library_versions(), models)]
        """References to the outcomes that are not received, oldest first."""

    def send(self, handler: Any, task: Any) -> None:
        self.pending.append(self._actor.run.remote(handler, task))

    def ask_progress(self) -> Any:
        """A reference to the units of progress since the last call."""
        return self._actor.fetch_progress.remote()

    def has_advanced(self, answer: Any) -> bool:
        """Keep an answer to `ask_progress` for `receive`."""
        import ray

        with suppress(ray.exceptions.RayError):  # `receive` raises it for the task
            self._advanced = ray.get(answer)
        return self._advanced > 0

    def receive(self) -> int | Outcome | None:
        import ray

        if self._advanced:
            advanced, self._advanced = self._advanced, 0
            return advanced
        try:
            outcome: Outcome = ray.get(self.pending.pop(0))
        except ray.exceptions.RayTaskError:  # no task's own error, which is an outcome
            raise
        except ray.exceptions.RayError as error:  # the actor, its node or its result
            raise WorkerLostError(first_line(error)) from None
        if self.ready:
            return outcome
        outcome.unwrap()
        self.ready = True
        return None

    def stop(self) -> None:
        import ray

        with suppress(ray.exceptions.RayError, RuntimeError):  # it is lost
            ray.kill(self._actor)


class RayProcess:
    """The actor. A second thread makes the outcome of a task while the next task runs; a third tells the progress."""

    def __init__(self, directory: Path) -> None:
        """`directory`: the driver's, which relative paths start from; it may be missing on a node."""
        with suppress(OSError):
            os.chdir(directory)
        self._runner, self._lock = WorkerRunner(), threading.Lock()
        self._advanced = 0

    @staticmethod
    def check(driver: str, versions: Mapping[str, str], models: Sequence[ModelRecord]) -> Outcome:
        """Compare libraries and models with those of the driver, which the artifact records. `driver`: its host."""
        own, host = library_versions(), socket.gethostname()
        differing = [
            f"{name} {own.get(name)} instead of {versions[name]}"
            for name in versions
            if own.get(name) != versions[name]
        ]
        try:
            for model in () if host == driver else models:
                found = model_record(model.role, model.name)
                if (found.weights, found.tokenizer) != (model.weights, model.tokenizer):
                    differing.append(f"another model at {model.name}")
        except InputError as error:
            return Outcome(error=InputError(f"On the node {host}: {error.cause}", error.remedy))
        if not differing:
            return Outcome()
        return Outcome(
            error=InputError(
                f"The node {host} has {', '.join(differing)}.", "Give all nodes the driver's versions and models."
            )
        )

    def run(self, handler: bytes, task: Any) -> Outcome:
        with self._lock:
            outcome = self._runner.run(handler, unpack(handler), task, self._advance)
        return outcome()

    def _advance(self, units: int) -> None:
        self._advanced += units

    def fetch_progress(self) -> int:
        """Units of progress since the last call."""
        advanced, self._advanced = self._advanced, 0
        return advanced
