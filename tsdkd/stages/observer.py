"""Observers receive the reports of a running stage; the command line shows them, library users may ignore them."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Protocol


class Observer(Protocol):
    """Receives the reports of one stage."""

    def progress(
        self, label: str, total: int, unit: str, done: int = 0
    ) -> AbstractContextManager[Callable[[int], None]]:
        """Open a progress bar; the function that it yields advances the bar by a number of units."""

    def metrics(self, values: dict[str, float]) -> None:
        """Report the current metrics of the work on the bar, by name."""

    def info(self, message: str) -> None:
        """Report one line that the user should know."""

    def warning(self, message: str) -> None:
        """Report one line about a possible fault; the journal of the artifact keeps it."""

    def writing(self, artifact: Path) -> AbstractContextManager[None]:
        """Surround the work on an artifact that is open for writing, to record the session."""

    def table(self, title: str, rows: list[tuple[str, str]]) -> None:
        """Report names and values before the work starts."""


class SilentObserver:
    """Ignores every report."""

    @contextmanager
    def progress(self, label: str, total: int, unit: str, done: int = 0) -> Iterator[Callable[[int], None]]:
        yield lambda _: None

    def metrics(self, values: dict[str, float]) -> None:
        pass

    def info(self, message: str) -> None:
        pass

    def warning(self, message: str) -> None:
        self.info(message)

    def writing(self, artifact: Path) -> AbstractContextManager[None]:
        return nullcontext()

    def table(self, title: str, rows: list[tuple[str, str]]) -> None:
        pass
