"""Worker processes of this machine: lost workers, errors and progress, with tasks that load no model."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.parallel_tasks import OpenCounter
from tsdkd.errors import InputError, OtherRankError, TsdkdError
from tsdkd.stages.config.score import ScoreConfig
from tsdkd.stages.observer import SilentObserver
from tsdkd.stages.parallel import local
from tsdkd.stages.parallel.choice import open_pool, require_parallel
from tsdkd.stages.parallel.local import LocalProcesses
from tsdkd.stages.parallel.pool import OwnProcess, Pool


class Messages(SilentObserver):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def info(self, message: str) -> None:
        self.lines.append(message)


@pytest.fixture(scope="module")
def observer() -> Messages:
    return Messages()


@pytest.fixture(scope="module")
def pool(observer: Messages) -> Iterator[Pool]:
    with open_pool(ScoreConfig(data_parallel=2), 1, (), observer) as opened:
        yield opened


def results(pool: Pool, opener: OpenCounter, tasks: list[str], **settings: Any) -> tuple[dict[str, Any], int]:
    found, progress = dict[str, Any](), list[int]()
    pool.run(opener, tasks, lambda task, result: found.update({task: result}), progress.append, **settings)
    return found, sum(progress)


def test_tasks_share_the_processes_and_keep_their_models(pool: Pool, observer: Messages, tmp_path: Path) -> None:
    opener, tasks = OpenCounter(tmp_path), [f"task {i}" for i in range(12)]
    for depth in (1, 2):
        found, progress = results(pool, opener, tasks, depth=depth)
        assert [found[task][0] for task in tasks] == tasks
        assert progress == 24
    assert len({process for _, process, _, _ in found.values()}) <= 2
    assert max(count for _, _, count, _ in found.values()) > 6  # the second call went on with the open handler
    assert observer.lines.count("opened") == 1  # by both


def test_a_lost_worker_costs_its_tasks_alone(pool: Pool, observer: Messages, tmp_path: Path) -> None:
    tasks = ["a", "dies", "b", "c", "d"]
    found, progress = results(pool, OpenCounter(tmp_path), tasks, depth=2)
    assert sorted(found) == sorted(tasks)
    assert progress == 10  # that of the lost attempt is taken back
    assert any("status -9" in line and "tasks run again: " in line for line in observer.lines)


def test_work_that_ends_each_worker_ends_the_run(pool: Pool, tmp_path: Path) -> None:
    with pytest.raises(TsdkdError, match=r"Workers ended 4 times at the same work .*status -9"):
        results(pool, OpenCounter(tmp_path), ["dies-always"])


def test_an_error_of_a_task_reaches_the_driver(pool: Pool, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="The task fails") as raised:
        results(pool, OpenCounter(tmp_path), ["fails"])
    assert raised.value.remedy == "Leave it out."


def test_one_process_runs_tasks_itself(tmp_path: Path) -> None:
    tasks = ["a", "b", "c"]
    with OwnProcess(SilentObserver()) as own:
        for depth in (1, 2):
            found, progress = results(own, OpenCounter(tmp_path), tasks, depth=depth)
            assert list(found) == tasks
            assert progress == 6


def test_more_gpus_than_there_are_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local.torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(InputError, match="needs 6 GPUs, and this machine shows 4") as raised:
        LocalProcesses(3, 2, SilentObserver())
    assert raised.value.remedy == "Give --data-parallel 2."
    assert LocalProcesses(2, 2, SilentObserver())._devices == ["2,3", "0,1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert LocalProcesses(2, 2, SilentObserver())._devices == ["6,7", "4,5"]


def test_processes_that_exceed_the_cores_are_reported(observer: Messages, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local.torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(local.os, "sched_getaffinity", lambda _: range(8))
    LocalProcesses(4, 1, observer)
    assert observer.lines[-1].startswith("4 processes with 8 threads each share 8 cores. OMP_NUM_THREADS=2 is faster")


def test_a_launcher_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="started once") as raised:
        require_parallel("score", ScoreConfig())
    assert "--data-parallel" in raised.value.remedy
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(OtherRankError):
        require_parallel("score", ScoreConfig())
