"""How a stage tells what it is doing; the command line shows it, a library user may ignore it."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Protocol


class Observer(Protocol):
    def progress(
        self, what: str, total: int, unit: str, done: int = 0
    ) -> AbstractContextManager[Callable[[int], None]]:
        """A bar with rate and time left; call what it yields with the units just done."""

    def metrics(self, values: dict[str, float]) -> None:
        """Where the work on the bar stands, by name."""

    def info(self, message: str) -> None:
        """One line about something the user should know."""

    def warning(self, message: str) -> None:
        """One line about something that may be wrong; the artifact's journal keeps it."""

    def writing(self, artifact: Path) -> AbstractContextManager[None]:
        """Around the work on an artifact that is open for writing: what it took may be noted beside it."""

    def table(self, title: str, rows: list[tuple[str, str]]) -> None:
        """Names and values worth reading before the work starts."""


class SilentObserver:
    """Tells nobody."""

    @contextmanager
    def progress(self, what: str, total: int, unit: str, done: int = 0) -> Iterator[Callable[[int], None]]:
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
