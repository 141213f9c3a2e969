"""Workers on a Ray cluster: each is an actor that keeps its resources, and so its GPUs and loaded models.

Ray places the actors and notices their loss. Tasks of Ray would not do: a process that is used again by a task with
another GPU keeps its first one, so Ray ends each process after a task with a GPU, and the models would be loaded again.
"""

import os
import pickle
import socket
import threading
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
from tsdkd.stages.parallel.pool import Worker, WorkerLostError, ignore_progress
from tsdkd.stages.parallel.tasks import OpenHandler, Outcome, WorkerRunner, unpack

AUTO = "auto"
"""The value of `--ray` without an address."""
PATIENCE = 30.0
"""Seconds without a message after which the user hears what the run waits for."""


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

    if address.startswith("ray://"):
        raise InputError(
            f"--ray {address} names a Ray Client server.", "Run the command on a node of the cluster, with --ray alone."
        )
    if ray.is_initialized():
        yield
        return
    try:
        ray.init(address=None if address == AUTO else address, log_to_driver=False, logging_level="ERROR")
    except Exception as error:  # of several types: no cluster, other versions, a wrong token
        raise InputError(
            f"The Ray cluster {address} cannot be joined ({first_line(error)}).",
            "Check the address with `ray status`; --ray alone joins the cluster of this machine, or starts one.",
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


class RayCluster:
    """Starts actors on the cluster that this process has joined."""

    def __init__(self, count: int | None, gpus: int, models: Sequence[ModelRecord], observer: Observer) -> None:
        """`count`: None: as many as the cluster has resources for. `gpus`: of each worker, where nodes have any.
        `models`: those that nodes need.

        A worker without a GPU has as many CPUs as this process has threads. Raises InputError where no node has them.
        """
        import ray

        self._observer, self._told, self._models = observer, False, models
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
        self._actor = ray.remote(max_concurrency=2, max_restarts=0)(RayProcess).options(
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

        by_ref = {cast("RayWorker", w).pending[0]: w for w in workers if cast("RayWorker", w).pending}
        done, _ = ray.wait(list(by_ref), timeout=None if self._told else PATIENCE, fetch_local=False)
        if not done and not any(worker.ready for worker in workers):
            self._told = True
            free = ray.available_resources()
            self._observer.info(
                f"Waiting for the Ray cluster: a worker needs {self._in_words(self.needs)}, and {self._in_words(free)} "
                "are free on all nodes together."
            )
        return [by_ref[ref] for ref in done]


class RayWorker:
    """The driver's handle on an actor."""

    def __init__(self, actor: Any, models: Sequence[ModelRecord]) -> None:
        self._actor, self.ready = actor, False
        self.pending = [actor.check.remote(socket.gethostname(), library_versions(), models)]
        """References to the outcomes that are not received, oldest first."""

    def send(self, handler: Any, task: Any) -> None:
        self.pending.append(self._actor.run.remote(handler, task))

    def receive(self) -> Outcome | None:
        import ray

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
    """The actor. A second thread makes the outcome of a task while the next task runs."""

    def __init__(self, directory: Path) -> None:
        """`directory`: the driver's, which relative paths start from; a node may lack it."""
        with suppress(OSError):
            os.chdir(directory)
        self._runner, self._lock = WorkerRunner(), threading.Lock()

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
            outcome = self._runner.run(handler, unpack(handler), task, ignore_progress)
        return outcome()
