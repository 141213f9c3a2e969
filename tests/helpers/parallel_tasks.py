"""A handler without models, whose tasks name what they do, and workers in the test's own process."""

import os
import pickle
import signal
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tsdkd.errors import InputError
from tsdkd.stages.observer import Observer, SilentObserver
from tsdkd.stages.parallel.pool import Worker, WorkerLostError
from tsdkd.stages.parallel.tasks import Advance, Finish, OpenHandler, Outcome, WorkerRunner, unpack


@dataclass(frozen=True)
class OpenCounter:
    """Opens a handler that returns its process and the number of tasks that it ran."""

    directory: Path

    @contextmanager
    def __call__(self, observer: Observer) -> Iterator[Callable[[Any, Advance], Finish]]:
        observer.warning("opened")
        count = 0

        def run(task: str, advance: Advance) -> Finish:
            nonlocal count
            count += 1
            advance(2)
            mark = self.directory / task
            if task.startswith("dies") and not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            if task == "fails":
                raise InputError("The task fails.", "Leave it out.")
            if task == "no memory":
                raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes")
            return lambda: (task, os.getpid(), count, os.environ.get("OMP_NUM_THREADS"))

        yield run


class Messages(SilentObserver):
    """Keeps messages."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def info(self, message: str) -> None:
        self.lines.append(message)


class InProcessBackend:
    """Workers with models of their own, which run a task when the pool waits for them; everything passes pickled."""

    def __init__(self, count: int, starts_late: bool = False) -> None:
        """`starts_late`: workers become ready in the order of their start, as on a cluster."""
        self.count, self.starts_late = count, starts_late
        self.workers: list[InProcessWorker] = []
        self.most = 0
        """The most tasks that a worker held."""
        self.packed = 0
        """How often a handler was packed; workers of a cluster open it anew each time."""
        self.lost: Callable[[int, Any], bool] = lambda number, task: False
        """Whether the worker of a number is lost at a task; the task None is its start."""

    def pack(self, open_handler: OpenHandler) -> bytes:
        self.packed += 1
        return pickle.dumps(open_handler)

    def start(self) -> Worker:
        self.workers.append(InProcessWorker(self, len(self.workers)))
        return self.workers[-1]

    def wait(self, workers: Collection[Any]) -> Collection[Any]:
        """The worker that waits longest, as if all worked at the same speed."""
        waiting = [worker for worker in workers if worker.tasks or not worker.ready]
        return [min(waiting, key=lambda worker: worker.turns)]


class InProcessWorker:
    def __init__(self, backend: InProcessBackend, number: int) -> None:
        self.backend, self.number, self.ready, self.turns = backend, number, not backend.starts_late, 0
        self.tasks = deque[tuple[bytes, bytes]]()
        self.outcomes = deque[Callable[[], Outcome]]()
        """Of the oldest tasks, which have run."""
        self.runner = WorkerRunner()

    def send(self, handler: bytes, task: Any) -> None:
        assert self.ready
        self.tasks.append((handler, pickle.dumps(task)))
        self.backend.most = max(self.backend.most, len(self.tasks))

    def receive(self) -> int | Outcome | None:
        """A task's progress comes before its outcome, and before that of the task before it."""
        self.turns += 1
        if self.outcomes and (len(self.outcomes) > 1 or len(self.tasks) == 1):
            outcome = self.outcomes.popleft()()
            _, task = self.tasks.popleft()
            if self.backend.lost(self.number, pickle.loads(task)):
                raise WorkerLostError("in a task")
            found: Outcome = pickle.loads(pickle.dumps(outcome))
            return found
        if not self.ready and self.backend.lost(self.number, None):
            raise WorkerLostError("at its start")
        if not self.ready:
            self.ready = True
            return None
        handler, task = self.tasks[len(self.outcomes)]
        progress = list[int]()
        self.outcomes.append(self.runner.run(handler, unpack(handler), pickle.loads(task), progress.append))
        return sum(progress)

    def stop(self) -> None:
        pass
