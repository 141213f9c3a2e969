"""Pools that run tasks: this process alone, or workers that a backend starts.

The driver hands a worker its next task when it has returned one, so that results wait nowhere. A task whose worker is
lost runs again on another one.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol, Self, TypeVar

from tsdkd.errors import TsdkdError
from tsdkd.stages.observer import Observer
from tsdkd.stages.parallel.tasks import Advance, Finish, OpenHandler, Outcome, TaskRunner

Task = TypeVar("Task")
MAX_ATTEMPTS = 4
"""Attempts at a task whose worker is lost each time; Ray's default for its own tasks."""


def ignore_progress(_: int) -> None:
    """An `Advance` for tasks without progress."""


class WorkerLostError(Exception):
    """A worker ended without an outcome; the message says how."""


class Worker(Protocol):
    """A process that runs tasks in the order in which it receives them."""

    ready: bool
    """Whether it runs; a worker of a cluster first waits for its resources."""

    def send(self, handler: Any, task: Any) -> None:
        """Hand over a task; `handler`: as `Backend.pack` returns it."""

    def receive(self) -> int | Outcome | None:
        """Units of progress, the outcome of the oldest task, or None when the worker has become ready.

        Raises WorkerLostError.
        """

    def stop(self) -> None: ...


class Backend(Protocol):
    """Starts workers."""

    count: int
    """Workers at a time, at most."""

    def pack(self, open_handler: OpenHandler) -> Any:
        """A handler as workers receive it."""

    def start(self) -> Worker: ...

    def wait(self, workers: Collection[Worker]) -> Collection[Any]:
        """Wait until some workers have a message, and return them."""


class Pool(Protocol):
    """Runs tasks."""

    count: int
    """Tasks at a time, at most."""

    def run(
        self,
        open_handler: OpenHandler,
        tasks: Iterable[Task],
        collect: Callable[[Task, Any], None],
        advance: Advance = ignore_progress,
        *,
        depth: int = 1,
    ) -> None:
        """Run tasks, and pass each with its result to `collect` when it finishes. Raises the first error of a task.

        `open_handler`: workers keep a handler open while calls name the same object. `depth`: tasks that a worker holds
        at a time; with 2, it makes the result of one while it runs the next.
        """


class OwnProcess:
    """Runs tasks in this process, one after the other; a context manager."""

    count = 1

    def __init__(self, observer: Observer) -> None:
        self._runner = TaskRunner(observer)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._runner.close()

    def run(
        self,
        open_handler: OpenHandler,
        tasks: Iterable[Task],
        collect: Callable[[Task, Any], None],
        advance: Advance = ignore_progress,
        *,
        depth: int = 1,
    ) -> None:
        """With a `depth` of 2, a thread calls `collect`."""

        def collect_result(task: Task, finish: Finish) -> None:
            collect(task, finish())

        last: Future[None] | None = None
        with ThreadPoolExecutor(1) as thread:
            for task in tasks:
                finish = self._runner.run(id(open_handler), open_handler, task, advance)
                if last:
                    last.result()
                last = thread.submit(collect_result, task, finish)
                if depth == 1:
                    last.result()
        if last:
            last.result()


@dataclass(slots=True)
class Attempt:
    """A task on a worker."""

    task: Any
    number: int = 1


@dataclass(slots=True, eq=False)
class Member:
    """A worker of a pool, with the tasks that it holds, oldest first."""

    worker: Worker
    attempts: deque[Attempt] = field(default_factory=deque)
    reported: int = 0
    """Units of progress that the worker reported; it may run the next task before it returns an outcome."""
    settled: int = 0
    """Units of the tasks that it returned."""

    @property
    def advanced(self) -> int:
        """Units that the driver shows: reports and outcomes may arrive in either order."""
        return max(self.reported, self.settled)


class WorkerPool:
    """Runs tasks on the workers of a backend; a context manager that stops them."""

    def __init__(self, backend: Backend, observer: Observer) -> None:
        self.count = backend.count
        self._backend, self._observer = backend, observer
        self._members: list[Member] = []
        self._packed: tuple[OpenHandler | None, Any] = None, None
        self._reported = set[tuple[str, str]]()
        self._failed_starts = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        members, self._members = self._members, []
        with ThreadPoolExecutor(len(members) or 1) as threads:
            for member in members:
                threads.submit(member.worker.stop)

    def run(
        self,
        open_handler: OpenHandler,
        tasks: Iterable[Task],
        collect: Callable[[Task, Any], None],
        advance: Advance = ignore_progress,
        *,
        depth: int = 1,
    ) -> None:
        try:
            self._run(open_handler, iter(tasks), collect, advance, depth)
        except BaseException:
            self.__exit__()  # their tasks belong to no later call
            raise

    def _run(
        self,
        open_handler: OpenHandler,
        waiting: Iterator[Task],
        collect: Callable[[Task, Any], None],
        advance: Advance,
        depth: int,
    ) -> None:
        if open_handler is not self._packed[0]:
            self._packed = open_handler, self._backend.pack(open_handler)
        held = deque[Attempt]()
        while True:
            self._hand_out(waiting, held, depth)
            if not held and not any(member.attempts for member in self._members):
                return
            members = {id(member.worker): member for member in self._members}
            for worker in self._backend.wait([member.worker for member in self._members]):
                member = members[id(worker)]
                shown = member.advanced
                try:
                    message = worker.receive()
                except WorkerLostError as error:
                    held.extendleft(self._remove(member, error, advance))
                    continue
                if message is None:
                    self._failed_starts = 0
                elif isinstance(message, Outcome):
                    self._report(message)
                    attempt = member.attempts.popleft()
                    result = message.unwrap()
                    member.settled += message.advanced
                    advance(member.advanced - shown)
                    self._hand_out(waiting, held, depth)  # before the driver works on the result
                    collect(attempt.task, result)
                else:
                    member.reported += message
                    advance(member.advanced - shown)

    def _hand_out(self, waiting: Iterator[Any], held: deque[Attempt], depth: int) -> None:
        """Give tasks to workers that hold the fewest, and start a worker for each task that finds all busy.

        `held`: tasks for the workers that start, and those of lost workers.
        """
        while True:
            ready = [member for member in self._members if member.worker.ready]
            member = min(ready, key=lambda member: len(member.attempts), default=None)
            starting = len(self._members) - len(ready)
            is_free = member is not None and not member.attempts
            if not is_free and self._can_start and self._hold(waiting, held, starting + 1):
                self._members.append(Member(self._backend.start()))
                continue
            if member is None or len(member.attempts) >= depth:
                return
            if not self._hold(waiting, held, 1 if is_free else starting + 1):
                return
            member.attempts.append(held.popleft())
            member.worker.send(self._packed[1], member.attempts[-1].task)

    @property
    def _can_start(self) -> bool:
        return len(self._members) < self._backend.count and self._failed_starts < MAX_ATTEMPTS

    @staticmethod
    def _hold(waiting: Iterator[Any], held: deque[Attempt], count: int) -> bool:
        """Take tasks until `count` are held; False when there are fewer."""
        held.extend(Attempt(task) for task in islice(waiting, max(0, count - len(held))))
        return len(held) >= count

    def _remove(self, member: Member, error: WorkerLostError, advance: Advance) -> list[Attempt]:
        """Remove a lost worker. Returns its tasks for another attempt; raises TsdkdError after too many."""
        self._members.remove(member)
        member.worker.stop()
        self._failed_starts += not member.worker.ready
        numbers = [attempt.number for attempt in member.attempts]
        if not member.worker.ready:
            self._observer.warning(f"A worker could not start ({error}).")
        if self._failed_starts >= MAX_ATTEMPTS and not self._members:
            raise TsdkdError(
                f"Workers could not start ({error}).",
                "Install the same tsdkd on every node, and look at the logs of Ray; complete parts are kept.",
            )
        if MAX_ATTEMPTS in numbers:
            raise TsdkdError(
                f"The same task ended {MAX_ATTEMPTS} workers ({error}).",
                "If memory ran out, use fewer processes or smaller batches; complete parts are kept.",
            )
        if numbers:
            self._observer.warning(f"A worker was lost ({error}). Its unfinished tasks run again: {len(numbers)}.")
        advance(member.settled - member.advanced)
        return [Attempt(attempt.task, attempt.number + 1) for attempt in member.attempts]

    def _report(self, outcome: Outcome) -> None:
        """Pass each message on once: every worker loads the same models."""
        for kind, text in outcome.reports:
            if (kind, text) not in self._reported:
                self._reported.add((kind, text))
                (self._observer.warning if kind == "warning" else self._observer.info)(text)
