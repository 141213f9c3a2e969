"""A thread that writes scores while the models read the next block."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self, TypeVar

Result = TypeVar("Result")


class BackgroundWriter:
    """Runs one function at a time in its thread; a context manager.

    `submit` waits for the previous call, and raises its exception.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._last: Future[Any] | None = None

    def submit(self, function: Callable[..., Result], *arguments: Any) -> Future[Result]:
        if self._last:
            self._last.result()
        future = self._thread.submit(function, *arguments)
        self._last = future
        return future

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()
