"""Pools without processes: who gets which task, lost workers, errors and progress."""

from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.helpers.parallel_tasks import InProcessBackend, Messages, OpenCounter
from tsdkd.errors import InputError, TsdkdError
from tsdkd.stages.observer import SilentObserver
from tsdkd.stages.parallel.pool import MAX_ATTEMPTS, OwnProcess, Pool, WorkerPool
from tsdkd.stages.parallel.tasks import Outcome

TASKS = [f"task {i}" for i in range(12)]


def results(pool: Pool, opener: OpenCounter, tasks: list[str], **settings: Any) -> tuple[dict[str, Any], int]:
    found, progress = dict[str, Any](), list[int]()
    pool.run(opener, tasks, lambda task, result: found.update({task: result}), progress.append, **settings)
    return found, sum(progress)


def test_one_process_runs_tasks_itself(tmp_path: Path) -> None:
    with OwnProcess(SilentObserver()) as own:
        for depth in (1, 2):
            found, progress = results(own, OpenCounter(tmp_path), TASKS, depth=depth)
            assert list(found) == TASKS
            assert progress == 24


@pytest.mark.parametrize("starts_late", [False, True])
@pytest.mark.parametrize("depth", [1, 2])
def test_workers_share_the_tasks_and_keep_their_models(tmp_path: Path, *, starts_late: bool, depth: int) -> None:
    backend, observer, opener = InProcessBackend(3, starts_late), Messages(), OpenCounter(tmp_path)
    with WorkerPool(backend, observer) as pool:
        for _ in range(2):
            found, progress = results(pool, opener, TASKS, depth=depth)
            assert [found[task][0] for task in TASKS] == TASKS
            assert progress == 24
    assert len(backend.workers) == 3
    assert backend.packed == 1
    assert backend.most == depth
    assert max(count for _, _, count, _ in found.values()) == 8  # the second call went on with the open handlers
    assert observer.lines == ["opened"]  # by all


def test_progress_never_goes_back(tmp_path: Path) -> None:
    """Though a worker runs its next task before it returns the outcome of the last one."""
    progress = list[int]()
    with WorkerPool(InProcessBackend(2), SilentObserver()) as pool:
        pool.run(OpenCounter(tmp_path), TASKS, lambda *_: None, progress.append, depth=2)
    assert (sum(progress), min(progress)) == (24, 0)


def test_an_outcome_may_come_before_the_report_of_its_progress(tmp_path: Path) -> None:
    """As on a cluster, where a thread of the worker reports."""
    messages, progress = deque([Outcome(advanced=2), 2, Outcome(advanced=2)]), list[int]()
    worker = SimpleNamespace(ready=True, send=lambda *_: None, receive=messages.popleft, stop=lambda: None)
    backend: Any = SimpleNamespace(count=1, pack=id, start=lambda: worker, wait=lambda workers: workers)
    with WorkerPool(backend, SilentObserver()) as pool:
        pool.run(OpenCounter(tmp_path), TASKS[:2], lambda *_: None, progress.append)
    assert progress == [2, 0, 2]


def test_a_worker_has_its_next_task_while_the_driver_works_on_a_result(tmp_path: Path) -> None:
    backend, held = InProcessBackend(2), list[int]()
    with WorkerPool(backend, SilentObserver()) as pool:
        pool.run(OpenCounter(tmp_path), TASKS, lambda *_: held.append(min(len(w.tasks) for w in backend.workers)))
    assert held == [1] * 10 + [0] * 2


def test_no_more_workers_start_than_there_are_tasks(tmp_path: Path) -> None:
    for starts_late in (False, True):
        backend = InProcessBackend(8, starts_late)
        with WorkerPool(backend, SilentObserver()) as pool:
            assert len(results(pool, OpenCounter(tmp_path), TASKS[:3], depth=2)[0]) == 3
        assert len(backend.workers) == 3
        assert {worker.turns for worker in backend.workers} == {2 + starts_late}  # one task each


def test_a_lost_worker_costs_its_tasks_alone(tmp_path: Path) -> None:
    backend, observer = InProcessBackend(2), Messages()
    backend.lost = lambda number, task: (number, task) == (0, TASKS[4])
    with WorkerPool(backend, observer) as pool:
        found, progress = results(pool, OpenCounter(tmp_path), TASKS, depth=2)
    assert sorted(found) == sorted(TASKS)
    assert progress == 24  # that of the lost attempt is taken back
    assert "A worker was lost (in a task). Its unfinished tasks run again: 2." in observer.lines
    assert len(backend.workers) == 3


def test_a_task_that_ends_each_worker_ends_the_run(tmp_path: Path) -> None:
    backend, message = InProcessBackend(2), rf"The same task ended {MAX_ATTEMPTS} workers \(in a task\)"
    attempts = list[str]()

    def loses_first(_: int, task: Any) -> bool:
        attempts.extend([task] * (task == TASKS[0]))
        return bool(task == TASKS[0])

    backend.lost = loses_first
    with pytest.raises(TsdkdError, match=message) as raised, WorkerPool(backend, SilentObserver()) as pool:
        results(pool, OpenCounter(tmp_path), TASKS)
    assert "memory" in raised.value.remedy
    assert len(attempts) == MAX_ATTEMPTS


def loses_starts(_: int, task: Any) -> bool:
    return task is None


def loses_starts_but_1(number: int, task: Any) -> bool:
    return task is None and number != 1


def test_workers_that_never_start_end_the_run_unless_another_one_works(tmp_path: Path) -> None:
    for others_work in (False, True):
        backend = InProcessBackend(3, starts_late=True)
        backend.lost, observer = loses_starts_but_1 if others_work else loses_starts, Messages()
        with WorkerPool(backend, observer) as pool:
            if others_work:
                assert len(results(pool, OpenCounter(tmp_path), TASKS)[0]) == 12
                assert len(backend.workers) <= 3 + MAX_ATTEMPTS
            else:
                with pytest.raises(TsdkdError, match=r"Workers could not start \(at its start\)"):
                    results(pool, OpenCounter(tmp_path), TASKS)
        assert "A worker could not start (at its start)." in observer.lines


def test_failed_starts_are_forgotten_when_a_worker_starts(tmp_path: Path) -> None:
    backend, before = InProcessBackend(1, starts_late=True), MAX_ATTEMPTS - 1
    backend.lost = lambda number, task: (
        (number, task) == (before, TASKS[4]) or (task is None and number not in {before, 2 * before + 1})
    )
    with WorkerPool(backend, SilentObserver()) as pool:
        assert len(results(pool, OpenCounter(tmp_path), TASKS)[0]) == 12
    assert len(backend.workers) == 2 * before + 2


def test_an_error_of_a_task_ends_the_run_and_leaves_no_task_behind(tmp_path: Path) -> None:
    with WorkerPool(InProcessBackend(2), SilentObserver()) as pool:
        with pytest.raises(InputError, match="The task fails") as raised:
            results(pool, OpenCounter(tmp_path), ["fails", "a", "b"], depth=2)
        assert raised.value.remedy == "Leave it out."
        assert "In a worker:" in raised.value.__notes__[0]
        assert list(results(pool, OpenCounter(tmp_path), ["c"])[0]) == ["c"]


def test_a_worker_without_memory_names_a_remedy(tmp_path: Path) -> None:
    with (
        WorkerPool(InProcessBackend(1), SilentObserver()) as pool,
        pytest.raises(TsdkdError, match=r"A worker ran out of memory .*you tried 9 bytes") as raised,
    ):
        results(pool, OpenCounter(tmp_path), ["no memory"])
    assert "batch size" in raised.value.remedy
