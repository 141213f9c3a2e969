"""Worker processes of this machine: their end, their GPUs and their threads."""

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from tests.helpers.parallel_tasks import Messages, OpenCounter
from tsdkd.errors import InputError, OtherRankError
from tsdkd.stages.config.eval import EvalConfig
from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.config.score import ScoreConfig
from tsdkd.stages.eval.stage import evaluate
from tsdkd.stages.generate.stage import generate
from tsdkd.stages.observer import SilentObserver
from tsdkd.stages.parallel import local
from tsdkd.stages.parallel.choice import open_pool, require_parallel
from tsdkd.stages.parallel.local import LocalProcesses
from tsdkd.stages.score.served import score_served
from tsdkd.stages.score.stage import score

DRIVER = """
from pathlib import Path
from tests.helpers.parallel_tasks import OpenCounter
from tsdkd.stages.config.score import ScoreConfig
from tsdkd.stages.observer import SilentObserver
from tsdkd.stages.parallel.choice import open_pool
if __name__ == "__main__":
    with open_pool(ScoreConfig(data_parallel=2), 1, (), SilentObserver()) as pool:
        tasks = (str(i) for i in range(10**9))
        pool.run(OpenCounter(Path()), tasks, lambda _, result: print(result[1], flush=True))
"""


def test_a_killed_process_costs_its_tasks_alone(tmp_path: Path) -> None:
    observer, found, progress = Messages(), dict[str, Any](), list[int]()
    tasks = ["a", "dies", "b", "c", "d"]
    with open_pool(ScoreConfig(data_parallel=2), 1, (), observer) as pool:
        pool.run(
            OpenCounter(tmp_path), tasks, lambda task, result: found.update({task: result}), progress.append, depth=2
        )
    assert {task: result[0] for task, result in found.items()} == {task: task for task in tasks}
    assert os.getpid() not in {process for _, process, _, _ in found.values()}
    assert sum(progress) == 10
    assert any("status -9" in line and "tasks run again: " in line for line in observer.lines)
    assert not {child.pid for child in psutil.Process().children()} & {process for _, process, _, _ in found.values()}


def test_workers_end_with_a_killed_driver(tmp_path: Path) -> None:
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER)
    process = subprocess.Popen([sys.executable, str(driver)], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    workers = [psutil.Process(int(process.stdout.readline()))]
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not psutil.wait_procs(workers, timeout=60)[1]


def test_the_driver_goes_on_while_a_worker_has_not_read_its_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """A task that exceeds the pipe's buffer comes while the worker starts, or runs another one."""
    own, child = Pipe()
    process = SimpleNamespace(**dict.fromkeys(("start", "terminate", "kill"), lambda: None), join=lambda *_: None)
    context = SimpleNamespace(Pipe=lambda: (own, Connection(os.dup(child.fileno()))), Process=lambda **_: process)
    monkeypatch.setattr(local.multiprocessing, "get_context", lambda _: context)
    released = list[str | None]()
    worker, task = local.LocalWorker("2,3", released.append), bytes(4 * 2**20)
    driver = Thread(target=lambda: [worker.send(b"", task) for _ in range(2)], daemon=True)
    driver.start()
    driver.join(30)
    assert not driver.is_alive()
    assert [pickle.loads(child.recv_bytes()) for _ in range(2)] == [(b"", task)] * 2
    worker.send(b"", task)
    child.close()
    worker.stop()
    assert released == ["2,3"]  # for the next worker


def test_a_worker_has_the_drivers_threads_and_gpus_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    threads, (own, child) = list[int](), Pipe()
    own.close()  # the driver has ended
    monkeypatch.setattr(local, "follow_parent", lambda: None)
    monkeypatch.setattr(local.torch, "set_num_threads", threads.append)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    local._serve(child, "2,3", 7)
    assert (threads, os.environ["CUDA_VISIBLE_DEVICES"]) == ([7], "2,3")


def test_more_gpus_than_there_are_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local.torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(InputError, match="needs 6 GPUs, and this machine shows 4") as raised:
        LocalProcesses(3, 2, SilentObserver())
    assert raised.value.remedy == "Give --data-parallel 2."
    assert LocalProcesses(2, 2, SilentObserver())._devices == ["2,3", "0,1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert LocalProcesses(2, 2, SilentObserver())._devices == ["6,7", "4,5"]


def test_processes_that_exceed_the_cores_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    observer = Messages()
    monkeypatch.setattr(local.torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(local.os, "sched_getaffinity", lambda _: range(8))
    LocalProcesses(4, 1, observer)
    assert observer.lines[-1].startswith("4 processes with 8 threads each share 8 cores. OMP_NUM_THREADS=2 is faster")
    observer.lines.clear()
    monkeypatch.setattr(local.torch, "get_num_threads", lambda: 1)
    LocalProcesses(9, 1, observer)
    assert not observer.lines  # no number is smaller


def test_a_launcher_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="starts its processes itself") as raised:
        require_parallel("score", ScoreConfig())
    assert "--data-parallel" in raised.value.remedy
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(OtherRankError):
        require_parallel("score", ScoreConfig())


def generate_nothing(path: Path) -> None:
    generate(path, "student", path, GenerateConfig())


def score_nothing(path: Path) -> None:
    score(path, "student", "teacher", path, ScoreConfig())


def score_nothing_served(path: Path) -> None:
    score_served(path, "student", "http://127.0.0.1:9", None, path, ScoreConfig(signal="topk"))


def evaluate_nothing(path: Path) -> None:
    evaluate("student", path, EvalConfig(("gsm8k",)))


@pytest.mark.parametrize("stage", [generate_nothing, score_nothing, score_nothing_served, evaluate_nothing])
def test_a_launcher_is_refused_before_a_stage_reads_its_inputs(
    stage: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="a launcher has started several"):
        stage(tmp_path / "missing")
