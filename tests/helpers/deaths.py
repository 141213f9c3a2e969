"""Work in a fork of the tests' process that is killed at a chosen call."""

import os
import signal
from collections.abc import Callable
from contextlib import AbstractContextManager
from unittest.mock import patch


def die_at(cls: type, name: str, call: int) -> AbstractContextManager[object]:
    """Kill this process (SIGKILL) when it calls a method for the `call`th time."""
    calls, method = iter(range(1, 1000)), getattr(cls, name)

    def wrapped(*args: object, **more: object) -> object:
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return method(*args, **more)

    return patch.object(cls, name, wrapped)


def killed(work: Callable[[], object], at: AbstractContextManager[object]) -> None:
    """Run `work` in a process that must be killed."""
    child = os.fork()
    if child == 0:
        with at:
            work()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
