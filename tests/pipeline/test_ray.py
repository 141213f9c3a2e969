"""A Ray cluster of two nodes writes what one process writes, byte for byte; lost workers and nodes cost their tasks."""

import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.parallel_tasks import OpenCounter
from tests.helpers.prompts import write_prompts
from tsdkd.artifacts.manifest import ModelRecord
from tsdkd.errors import InputError
from tsdkd.stages.config.eval import EvalConfig
from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.config.score import ScoreConfig
from tsdkd.stages.eval.stage import evaluate
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
NODE = {"num_cpus": 2, "object_store_memory": 80 * 2**20}
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
            cluster.add_node(**NODE)
            with connected(cluster.address):
                yield cluster
        finally:
            cluster.shutdown()


def test_the_cluster_writes_the_bytes_of_one_process(
    cluster: Any, student: Path, teacher: Path, rows: Path, tmp_path: Path, contents: Contents
) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl", 20)
    generation = GenerateConfig(max_new_tokens=20, part_size=5)
    benchmarks = EvalConfig(("gsm8k",), batch_size=2, max_new_tokens=12)
    for place, where in (("one", {}), ("cluster", {"ray": cluster.address, "data_parallel": 2})):
        run = tmp_path / place
        generate(prompts, str(student), run / "rollouts", replace(generation, **where))
        score(run / "rollouts", str(student), str(teacher), run / "scores", ScoreConfig(k=4, **where))
        evaluate(str(student), run / "results" / "m", replace(benchmarks, **where), rows)
    assert contents(tmp_path / "cluster") == contents(tmp_path / "one")


def test_a_worker_that_does_not_see_the_directory_returns_the_parts(
    cluster: Any, student: Path, teacher: Path, tmp_path: Path, contents: Contents, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl", 6)
    rollouts = generate(prompts, str(student), tmp_path / "r", GenerateConfig(max_new_tokens=9, part_size=3)).path
    expected = score(rollouts, str(student), str(teacher), tmp_path / "one", ScoreConfig(k=4)).path
    monkeypatch.setattr(
        stage, "open_destination", lambda writer: nullcontext(PartDestination(writer.path.absolute(), "not there"))
    )
    config = ScoreConfig(k=4, ray=cluster.address, data_parallel=1)
    assert contents(score(rollouts, str(student), str(teacher), tmp_path / "c", config).path) == contents(expected)


def test_a_lost_worker_and_a_lost_node_cost_their_tasks_alone(cluster: Any, tmp_path: Path) -> None:
    node = cluster.add_node(**NODE)
    found, tasks = dict[str, Any](), ["dies", *(f"task {i}" for i in range(30))]

    def collect(task: str, result: Any) -> None:
        found[task] = result
        if len(found) == 5:
            cluster.remove_node(node, allow_graceful=False)

    with open_pool(ScoreConfig(ray=cluster.address), 1, (), SilentObserver()) as pool:
        assert pool.count == 6
        pool.run(OpenCounter(tmp_path), tasks, collect)
        with pytest.raises(InputError, match="The task fails"):
            pool.run(OpenCounter(tmp_path), ["fails"], lambda *_: None)
    assert sorted(found) == sorted(tasks)
    assert {threads for _, _, _, threads in found.values()} == {"1"}
    assert max(count for _, _, count, _ in found.values()) > 1  # workers keep what they opened


def test_workers_that_no_node_has_resources_for_are_refused(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster.torch, "get_num_threads", lambda: 64)
    with pytest.raises(InputError, match=r"No node of the Ray cluster has 64 CPUs; the largest has 2 CPUs") as raised:
        RayCluster(None, 1, (), SilentObserver())
    assert "OMP_NUM_THREADS" in raised.value.remedy


def test_a_cluster_that_cannot_be_joined_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="names a Ray Client server"), connected("ray://localhost:10001"):
        pass
    monkeypatch.setattr(ray, "is_initialized", lambda: False)

    def fail(**_: object) -> None:
        raise ConnectionError("nobody answers\nat all")

    monkeypatch.setattr(ray, "init", fail)
    with (
        pytest.raises(InputError, match=r"Ray cluster host:1 cannot be joined \(nobody answers\)"),
        connected("host:1"),
    ):
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
        ((versions, [missing(model)]), "On the node"),
    ):
        error = RayProcess.check("elsewhere", *arguments).error
        assert isinstance(error, InputError)
        assert named in error.cause


def missing(model: ModelRecord) -> ModelRecord:
    return replace(model, name="/nowhere/model")
