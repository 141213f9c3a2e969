"""Processes that run the arms of an experiment, with a progress bar."""

import multiprocessing
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tsdkd.child_processes import follow_parent


@dataclass(frozen=True)
class Workers:
    """A pool of processes; without a pool, this process is the only worker."""

    pool: ProcessPoolExecutor | None
    console: Console

    def show(self, text: str) -> None:
        """Write a line with the time of day."""
        self.console.print(f"{time.strftime('%H:%M')} {text}", soft_wrap=True, markup=False, highlight=False)

    def each(self, title: str, function: Callable[..., object], calls: Sequence[tuple[Any, ...]]) -> None:
        """Call a function once for each tuple of arguments, in any order."""
        self.show(title)
        if not calls:
            return
        columns = BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}")
        with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=self.console) as progress:
            for _ in progress.track(self._results(function, calls), total=len(calls), description=""):
                pass

    def _results(self, function: Callable[..., object], calls: Sequence[tuple[Any, ...]]) -> Iterator[object]:
        if self.pool is None:
            yield from (function(*arguments) for arguments in calls)
        else:
            handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # a worker that starts inherits it
            running = [self.pool.submit(function, *arguments) for arguments in calls]
            signal.signal(signal.SIGINT, handler)
            yield from (call.result() for call in as_completed(running))


@contextmanager
def open_workers(number: int) -> Iterator[Workers]:
    """Start workers. After an error, running calls finish and no other starts; Ctrl-C kills them: arms resume."""
    console = Console(file=sys.stdout)  # arms redirect the output of their commands
    if number == 1:
        yield Workers(None, console)
        return
    with ProcessPoolExecutor(number, multiprocessing.get_context("spawn"), follow_parent) as pool:
        try:
            yield Workers(pool, console)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                for worker in multiprocessing.active_children():
                    worker.kill()
            pool.shutdown(cancel_futures=True)
            raise
