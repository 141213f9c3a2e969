"""A handler without models, for tests of pools: each task names what it does."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tsdkd.errors import InputError
from tsdkd.stages.observer import Observer
from tsdkd.stages.parallel.tasks import Advance, Finish


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
            if task == "dies-always":
                os.kill(os.getpid(), signal.SIGKILL)
            if task == "fails":
                raise InputError("The task fails.", "Leave it out.")
            return lambda: (task, os.getpid(), count, os.environ.get("OMP_NUM_THREADS"))

        yield run
