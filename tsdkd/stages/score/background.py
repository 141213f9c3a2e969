"""score: rollouts -> scores. Both models read every response once; what TSD-KD asks of them is written down."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self


class BackgroundWriter:
    """Does one thing after the other in a thread of its own; a call waits for the one before, and raises its error."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._last: Future[None] | None = None

    def __call__(self, work: Callable[..., None], *arguments: Any) -> None:
        self._wait()
        self._last = self._thread.submit(work, *arguments)

    def _wait(self) -> None:
        if self._last:
            self._last.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self._thread.shutdown()
        if not error:
            self._wait()
