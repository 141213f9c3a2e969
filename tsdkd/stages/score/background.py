"""A thread that writes scores while the models read the next block."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self


class BackgroundWriter:
    """Runs one function at a time in its thread; a context manager.

    `submit` and the end of the context wait for the previous call, and raise its exception.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._last: Future[None] | None = None

    def submit(self, function: Callable[..., None], *arguments: Any) -> None:
        self._wait()
        self._last = self._thread.submit(function, *arguments)

    def _wait(self) -> None:
        if self._last:
            self._last.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self._thread.shutdown()
        if not error:
            self._wait()
