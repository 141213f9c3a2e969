"""The choice of a pool: this process, worker processes of this machine, or a Ray cluster."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from tsdkd.artifacts.manifest import ModelRecord
from tsdkd.errors import InputError, OtherRankError
from tsdkd.processes import rank, world_size
from tsdkd.stages.observer import Observer
from tsdkd.stages.parallel.pool import OwnProcess, Pool, WorkerPool


class ParallelConfig(Protocol):
    """The settings of a command that runs tasks in parallel; no artifact records them."""

    @property
    def data_parallel(self) -> int | None:
        """Workers; None: one, or as many as the cluster has resources for."""

    @property
    def ray(self) -> str | None:
        """The address of a Ray cluster, or "auto"."""


PARALLEL_FIELDS = frozenset({"data_parallel", "ray"})
"""Fields of `ParallelConfig`."""


def is_parallel(config: ParallelConfig) -> bool:
    """Whether tasks leave this process."""
    return config.ray is not None or (config.data_parallel or 1) > 1


def require_parallel(command: str, config: ParallelConfig) -> None:
    """Raises InputError if a launcher started the command several times, or if `--ray` is given without Ray."""
    if world_size() > 1:
        if rank():
            raise OtherRankError
        raise InputError(
            f"tsdkd {command} starts its processes itself, and a launcher has started several.",
            "Leave out torchrun or accelerate launch, and give --data-parallel N.",
        )
    if config.ray is not None:
        from tsdkd.stages.parallel.ray_cluster import require_ray

        require_ray()


@contextmanager
def open_pool(config: ParallelConfig, gpus: int, models: Sequence[ModelRecord], observer: Observer) -> Iterator[Pool]:
    """Open the pool of a command, and stop its workers afterwards.

    `gpus`: GPUs per worker, if the machine has any; `models`: the models that workers load. Raises InputError for a
    cluster that cannot be joined, and if the GPUs or the cluster's resources are too few.
    """
    if config.ray is not None:
        from tsdkd.stages.parallel.ray_cluster import RayCluster, connected

        with connected(config.ray):
            cluster = RayCluster(config.data_parallel, gpus, models, observer)
            with WorkerPool(cluster, observer) as pool:
                yield pool
    elif is_parallel(config):
        from tsdkd.stages.parallel.local import LocalProcesses

        with WorkerPool(LocalProcesses(config.data_parallel or 1, gpus, observer), observer) as pool:
            yield pool
    else:
        with OwnProcess(observer) as own:
            yield own
