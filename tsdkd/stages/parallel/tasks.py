"""Tasks and the code that runs them, which is the same in this process, in a worker process and on a Ray cluster.

A handler holds the models. It runs a task and returns a function that makes the task's result: a worker may call that
function after the next task has run, so that a result is written while the models work.
"""

import fcntl
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tsdkd.errors import TsdkdError, first_line
from tsdkd.stages.observer import Observer, SilentObserver

Advance = Callable[[int], None]
Finish = Callable[[], Any]
Handler = Callable[[Any, Advance], Finish]
OpenHandler = Callable[[Observer], AbstractContextManager[Handler]]
"""Loads the models of a handler, and frees their memory afterwards. Workers receive it pickled."""
NO_MAIN_MEMORY = "DefaultCPUAllocator: can't allocate memory"
"""Part of the message of torch's RuntimeError when main memory is short."""


@dataclass(slots=True)
class Outcome:
    """What a worker returns for a task."""

    result: Any = None
    error: Exception | None = None
    advanced: int = 0
    """Units of progress of the whole task."""
    reports: list[tuple[str, str]] = field(default_factory=list)
    """Messages of the worker since its last outcome: "info" or "warning", and the text."""

    def unwrap(self) -> Any:
        """The result. Raises the task's error."""
        if self.error:
            raise self.error
        return self.result


class ReportCollector(SilentObserver):
    """Keeps messages until the driver fetches them."""

    def __init__(self) -> None:
        self.reports: list[tuple[str, str]] = []

    def info(self, message: str) -> None:
        self.reports.append(("info", message))

    def warning(self, message: str) -> None:
        self.reports.append(("warning", message))

    def pop(self) -> list[tuple[str, str]]:
        reports, self.reports = self.reports, []
        return reports


class TaskRunner:
    """Runs tasks one after the other; keeps the handler open until another one is needed."""

    def __init__(self, observer: Observer) -> None:
        self._observer, self._stack = observer, ExitStack()
        self._key: object = None
        self._handler: Handler | None = None

    def run(self, key: object, open_handler: OpenHandler, task: Any, advance: Advance) -> Finish:
        """`key`: identifies the handler; another one replaces the handler that is open."""
        if self._handler is None or key != self._key:
            self.close()
            self._handler, self._key = self._stack.enter_context(open_handler(self._observer)), key
        return self._handler(task, advance)

    def close(self) -> None:
        self._handler = None
        self._stack.close()


class WorkerRunner:
    """A `TaskRunner` whose outcomes can be sent to the driver."""

    def __init__(self) -> None:
        self._reports = ReportCollector()
        self._runner = TaskRunner(self._reports)

    def run(self, key: object, open_handler: OpenHandler, task: Any, advance: Advance) -> Callable[[], Outcome]:
        """Run a task; the function that is returned makes the outcome. Neither raises an error of the task."""
        advanced = 0

        def count(units: int) -> None:
            nonlocal advanced
            advanced += units
            advance(units)

        try:
            finish = self._runner.run(key, open_handler, task, count)
        except Exception as error:  # the driver raises it
            failure = portable_error(error)
            return lambda: Outcome(error=failure, reports=self._reports.pop())

        def outcome() -> Outcome:
            try:
                return Outcome(finish(), advanced=advanced, reports=self._reports.pop())
            except Exception as error:  # the driver raises it
                return Outcome(error=portable_error(error), reports=self._reports.pop())

        return outcome

    def close(self) -> None:
        self._runner.close()


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Let one process of this user and machine at a time run the block, which loads a model into main memory."""
    path = Path(tempfile.gettempdir()) / f"tsdkd-{os.getuid()}.lock"
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def unpack(packed: bytes) -> OpenHandler:
    """A pickled handler, which is unpickled when it is opened: a worker keeps the open one."""

    def open_handler(observer: Observer) -> AbstractContextManager[Handler]:
        handler: AbstractContextManager[Handler] = pickle.loads(packed)(observer)
        return handler

    return open_handler


def portable_error(error: Exception) -> Exception:
    """The error with the worker's traceback as a note; a RuntimeError for one that cannot be pickled."""
    note = "In a worker:\n" + "".join(traceback.format_exception(error))
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or NO_MAIN_MEMORY in str(error):
        error = TsdkdError(
            f"A worker ran out of memory ({first_line(error)}).",
            "Lower the batch size, or use fewer workers on each device; complete parts are kept.",
        )
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # of any type, by its own constructor
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(note)
    return error
