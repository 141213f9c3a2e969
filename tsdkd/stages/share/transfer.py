"""Copies files in several threads; an error or Ctrl-C stops all of them."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from threading import Event, Lock
from typing import Protocol, TypeVar

from tsdkd.errors import TsdkdError

WORKERS = 4
"""Files that are copied at once; each holds a few blocks in memory."""
BLOCK = 16 << 20
"""Bytes that are read, sent and hashed at once; a multiple of what stores require of the parts of an upload."""
Item = TypeVar("Item")
Result = TypeVar("Result")


class Source(Protocol):
    """A file that is read."""

    def read(self, size: int, /) -> bytes: ...


class Target(Protocol):
    """A file that is written."""

    def write(self, data: bytes, /) -> object: ...


class _StoppedError(Exception):
    """Ends a thread after another one failed."""


class Transfer:
    """Threads that copy files, and their common progress."""

    def __init__(self, advance: Callable[[int], None] = lambda _: None) -> None:
        """`advance` receives numbers of bytes that are written, from one thread at a time."""
        self._advance, self._lock, self._stopped = advance, Lock(), Event()

    def each(self, work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Yield the results as they are there. After an error or Ctrl-C, no thread runs any more."""
        pool = ThreadPoolExecutor(WORKERS)
        try:
            for future in as_completed([pool.submit(work, item) for item in items]):
                yield future.result()
        finally:
            self._stopped.set()
            pool.shutdown(cancel_futures=True)
            self._stopped.clear()

    def _count(self, written: int) -> None:
        if self._stopped.is_set():
            raise _StoppedError
        with self._lock:
            self._advance(written)

    def copy(self, source: Source, target: Target | None, size: int, block: int = BLOCK) -> str:
        """Copy a file of `size` bytes. Returns its SHA-256. `target`: None to hash only, which advances nothing.

        Raises TsdkdError for a file that is shorter or longer.
        """
        digest, left = hashlib.sha256(), size
        while data := source.read(min(block, left + 1)):
            left -= len(data)
            if left < 0:
                break
            digest.update(data)
            if target is not None:
                target.write(data)
            self._count(len(data) if target is not None else 0)
        if left:
            more = "more" if left < 0 else "less"
            raise TsdkdError(f"A file has {more} than its {size:,} bytes.", "It changed meanwhile: start again.")
        return digest.hexdigest()
