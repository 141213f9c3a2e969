"""A Ray cluster of two nodes writes what one process writes, byte for byte; lost workers and nodes cost their tasks."""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.parallel_tasks import Messages, OpenCounter
from tests.helpers.prompts import write_prompts
from tsdkd.artifacts.manifest import ModelRecord
from tsdkd.errors import InputError
from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.config.score import ScoreConfig
from tsdkd.stages.generate.stage import generate
from tsdkd.stages.models.record import library_versions, model_record
from tsdkd.stages.observer import SilentObserver
from tsdkd.stages.parallel import ray_cluster
from tsdkd.stages.parallel.choice import open_pool
from tsdkd.stages.parallel.part_files import PartDestination
from tsdkd.stages.parallel.ray_cluster import RayCluster, RayProcess, connected
from tsdkd.stages.score import stage
from tsdkd.stages.score.stage import score

ray = pytest.importorskip("ray", reason="needs the extra tsdkd[ray]")

Contents = Callable[[Path], dict[str, bytes]]
NODE = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
LOST_QUICKLY = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 2}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """This process has joined it."""
    from ray.cluster_utils import Cluster

    environment = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    environment |= {"RAY_worker_niceness": "0"}  # else they wait for other tests
    environment |= {"HOME": str(tmp_path_factory.mktemp("home"))}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        head = NODE | {"include_dashboard": False, "_system_config": LOST_QUICKLY}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            cluster.second = cluster.add_node(**NODE)
            with connected(cluster.address):
                yield cluster
        finally:
            cluster.shutdown()


def test_the_cluster_writes_the_bytes_of_one_process(
    cluster: Any, student: Path, teacher: Path, tmp_path: Path, contents: Contents, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker writes parts into the artifact's directory, or returns them where it does not see it."""
    prompts = write_prompts(tmp_path / "prompts.jsonl", 8)
    generation, scoring = GenerateConfig(max_new_tokens=9, part_size=4), ScoreConfig(k=4)
    messages = Messages()
    with open_pool(ScoreConfig(ray=cluster.address), 1, (), messages) as pool:
        monkeypatch.setattr("tsdkd.stages.generate.stage.open_pool", lambda *_: nullcontext(pool))
        monkeypatch.setattr("tsdkd.stages.score.stage.open_pool", lambda *_: nullcontext(pool))
        rollouts = generate(prompts, str(student), tmp_path / "r", generation).path
        models = rollouts, str(student), str(teacher)
        seen = score(*models, tmp_path / "seen", scoring).path
        monkeypatch.setattr(
            stage, "open_destination", lambda writer: nullcontext(PartDestination(writer.path.absolute(), "not there"))
        )
        unseen = score(*models, tmp_path / "unseen", scoring).path
        found = lost_workers(cluster, pool, tmp_path, messages)
    monkeypatch.undo()
    assert contents(generate(prompts, str(student), tmp_path / "one", generation).path) == contents(rollouts)
    expected = contents(score(*models, tmp_path / "scores", scoring).path)
    assert contents(seen) == expected
    assert contents(unseen) == expected
    assert {threads for *_, threads in found.values()} == {"1"}


def lost_workers(cluster: Any, pool: Any, directory: Path, messages: Messages) -> dict[str, Any]:
    """Results of tasks, of which one kills its worker; then a node is lost. Tasks come until both are reported."""
    found, tasks, living = dict[str, Any](), list[str](), set[int]()
    assert pool.count == 2

    def unending_tasks() -> Iterator[str]:
        while sum("A worker was lost" in line for line in messages.lines) < 2:
            tasks.append(f"task {len(tasks)}" if tasks else "dies")
            yield tasks[-1]

    def collect(task: str, result: Any) -> None:
        if "dies" in found and len(living) < 2:
            living.add(result[1])
            if len(living) == 2:  # one on each node: before, the lost node might have had none that runs tasks
                cluster.remove_node(cluster.second, allow_graceful=False)
        found[task] = result

    pool.run(OpenCounter(directory), unending_tasks(), collect)
    assert sorted(found) == sorted(tasks)
    assert max(number for _, _, number, _ in found.values()) > 1  # workers keep what they opened
    with pytest.raises(InputError, match="The task fails"):
        pool.run(OpenCounter(directory), ["fails"], collect)
    return found


def test_workers_that_no_node_has_resources_for_are_refused(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster.torch, "get_num_threads", lambda: 64)
    with pytest.raises(InputError, match=r"No node of the Ray cluster has 64 CPUs; the largest has 1 CPUs") as raised:
        RayCluster(None, 1, (), SilentObserver())
    assert "OMP_NUM_THREADS" in raised.value.remedy


def test_a_cluster_that_cannot_be_joined_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray waits two minutes and ends the process"))
    monkeypatch.setenv("RAY_ADDRESS", "ray://localhost:10001")
    with pytest.raises(InputError, match="--ray ray://localhost:10001 names a Ray Client"), connected("auto"):
        pass
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        message = rf"Ray cluster {address} cannot be joined \(.*refused"
        with pytest.raises(InputError, match=message) as raised, connected(address):
            pass
    assert "ray status" in raised.value.remedy
    for address in ("localhost", "localhost:x", "localhost:99999"):
        with pytest.raises(InputError, match=rf"Ray cluster {address} cannot be joined"), connected(address):
            pass


def test_ray_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster, "find_spec", lambda _: None)
    with pytest.raises(InputError, match="Ray is not installed") as raised:
        ray_cluster.require_ray()
    assert "tsdkd[ray]" in raised.value.remedy


def test_nodes_with_other_libraries_or_models_are_refused(student: Path, teacher: Path) -> None:
    versions, model = library_versions(), model_record("student", str(student))
    assert RayProcess.check("elsewhere", versions, [model]).error is None
    other = replace(model, name=str(teacher))
    assert RayProcess.check(os.uname().nodename, versions, [other]).error is None  # the driver's own files
    for arguments, named in (
        ((versions | {"torch": "0.1"}, [model]), "instead of 0.1"),
        ((versions, [other]), f"another model at {teacher}"),
        ((versions, [replace(model, weights="other")]), f"another model at {student}"),
        ((versions, [replace(model, tokenizer="other")]), f"another model at {student}"),
        ((versions, [missing(model)]), "On the node"),
    ):
        error = RayProcess.check("elsewhere", *arguments).error
        assert isinstance(error, InputError)
        assert named in error.cause


def missing(model: ModelRecord) -> ModelRecord:
    return replace(model, name="/nowhere/model")
