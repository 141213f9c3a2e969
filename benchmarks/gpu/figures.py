"""Figures of the GPU scripts: measured once, on disk at once, shown as tables with targets. Loads no torch."""

import argparse
import ctypes
import fcntl
import json
import math
import os
import signal
import subprocess
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

Figure = dict[str, float | str]
OUT = Path("gpu-figures")
ATTEMPTS = 2
"""A figure that ended its process or was stopped this often is not started again."""
DEVICE_LOST = 75
"""Exit code of a script whose device refuses further work: a new process measures the other figures."""
PR_SET_PDEATHSIG = 1
LIBC = ctypes.CDLL(None)
screen = Console(width=160, highlight=False, soft_wrap=True)


class OutOfTimeError(Exception):
    """A figure was stopped because the time is over; the next start continues it."""


@dataclass(frozen=True)
class Options:
    """The arguments of every script."""

    out: Path
    """Directory of the JSON files."""
    tiny: bool
    """Sizes that a CPU computes in seconds."""
    seconds: float
    """No figure is begun after this time."""
    device: str
    """"cuda" or "cpu"."""
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds_left(self) -> float:
        return self.seconds - (time.monotonic() - self.started)


def argument_parser(description: str | None, seconds: float) -> argparse.ArgumentParser:
    """The arguments that scripts and driver share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, help=f"directory of the JSON files (default: {OUT})")
    parser.add_argument("--tiny", action="store_true", help="sizes that a CPU computes in seconds")
    parser.add_argument("--seconds", type=float, default=seconds, help=f"begin nothing after them ({seconds:g})")
    return parser


@dataclass(frozen=True)
class Target:
    """A value of a script's figures, and the largest that it may have."""

    text: str
    value: Callable[[Mapping[str, Figure]], Any]
    """Raises KeyError as long as a figure is missing."""
    most: float

    def describe(self, figures: Mapping[str, Figure], *, tiny: bool) -> str:
        try:
            value = float(self.value(figures))
        except KeyError as missing:
            return f"{self.text}: not measured, {missing} is missing"
        if math.isnan(value):
            return f"{self.text}: not measured on this device"
        result = "not compared at tiny sizes" if tiny else "met" if value <= self.most else "missed"
        return f"{self.text}: {value:.3g}, at most {self.most:g}: {result}"


class Figures:
    """The figures of one script by name, in a JSON file. A figure that the file holds is not measured again.

    One script at a time measures into a directory; another one waits. Raises SystemExit for a file of another machine.
    """

    def __init__(
        self,
        script: str,
        title: str,
        columns: Sequence[str],
        options: Options,
        environment: Mapping[str, str],
        targets: Sequence[Target] = (),
        attempts: float = ATTEMPTS,
    ) -> None:
        self.options, self.targets, self.attempts = options, targets, attempts
        self.path = options.out / f"{script}.json"
        options.out.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(options.out)
        measured: dict[str, Any] = {"environment": dict(environment), "figures": {}, "failed": {}, "begun": {}}
        if self.path.exists():
            measured = json.loads(self.path.read_text())
            if measured["environment"] | {"date": ""} != {**environment, "date": ""}:
                raise SystemExit(
                    f"{self.path} has figures of another machine: {measured['environment']}. Name another --out."
                )
        self.content = measured | {"title": title, "columns": list(columns), "complete": False}

    @property
    def values(self) -> dict[str, Figure]:
        measured: dict[str, Figure] = self.content["figures"]
        return measured

    def measure(self, name: str, work: Callable[[], Figure], device_works: Callable[[], bool] = lambda: True) -> None:
        """Measure and save one figure; an error is saved as its traceback, and the next figure begins.

        Raises SystemExit with `DEVICE_LOST` if an error leaves the device in a state that refuses further work.
        """
        begun: dict[str, int] = self.content["begun"]
        if name in self.values:
            return
        if self.options.seconds_left < 0:
            screen.print(f"{name}: not started, the time is over", markup=False)
            return
        if begun.get(name, 0) >= self.attempts:
            self.content["failed"].setdefault(name, f"It was started {self.attempts} times and never ended.")
            self.save()
            screen.print(f"{name}: not started, it was started {self.attempts} times and never ended", markup=False)
            return
        begun[name] = begun.get(name, 0) + 1
        self.save()
        start = time.monotonic()
        try:
            figure = work()
        except OutOfTimeError:
            screen.print(f"{name}: stopped, the time is over", markup=False)
        except Exception as error:  # whatever a kernel, a driver or a library raises
            self.content["failed"][name] = traceback.format_exc()
            screen.print(f"{name}: failed ({type(error).__name__}: {str(error).splitlines()[:1]})", markup=False)
            if not device_works():
                self.save()
                raise SystemExit(DEVICE_LOST) from None
        else:
            self.content["failed"].pop(name, None)
            self.values[name] = figure
            shown = {column: _format(figure[column]) for column in self.content["columns"] if column in figure}
            screen.print(f"{name}: {shown} ({time.monotonic() - start:.0f} s)", markup=False)
        del begun[name]
        self.save()

    def save(self) -> None:
        self.content["targets"] = [target.describe(self.values, tiny=self.options.tiny) for target in self.targets]
        temporary = self.path.with_suffix(".tmp")
        with temporary.open("w") as file:
            file.write(json.dumps(self.content, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)

    def finish(self, expected: Sequence[str]) -> None:
        """Release the directory and print the table; exit with 1 if a figure failed or is missing."""
        self.content["complete"] = all(name in self.values for name in expected)
        self.save()
        os.close(self._lock)
        show(self.content)
        raise SystemExit(int(not self.content["complete"]))


def within(difference: float, bound: float) -> Figure:
    """The figure of a difference. Raises ValueError if it is beyond its bound."""
    if not difference <= bound:
        raise ValueError(f"the difference is {difference:.2g}, the bound {bound:g}")
    return {"result": "ok", "difference": difference, "bound": bound}


def show(content: Mapping[str, Any]) -> None:
    """Print the table, the targets and the errors of a script's JSON; the row of an error is marked as failed."""
    table = Table("", *content["columns"], title=content["title"])
    for name, figure in content["figures"].items():
        table.add_row(escape(name), *(_format(figure.get(column)) for column in content["columns"]))
    for name in content["failed"]:
        table.add_row(escape(name), "FAILED")
    screen.print(table)
    screen.print(", ".join(f"{name} {value}" for name, value in content["environment"].items()), markup=False)
    for line in content["targets"]:
        screen.print(f"target: {line}", markup=False)
    for name, text in content["failed"].items():
        screen.print(f"{name} failed:\n{text}", markup=False)


def start(words: Sequence[str], **settings: Any) -> subprocess.Popen[bytes]:
    """Start a command that the kernel kills when this process ends, so that nothing keeps the device."""
    return subprocess.Popen(words, preexec_fn=_end_with_parent, **settings)  # noqa: PLW1509  it calls the kernel alone


def _end_with_parent() -> None:
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _format(value: float | str | None) -> str:
    return "" if value is None else escape(value) if isinstance(value, str) else f"{value:.4g}"


def _lock(directory: Path) -> int:
    """Lock a directory until the descriptor is closed, or the process ends; nothing stays on disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        screen.print(f"another script measures into {directory}: waiting for its end", markup=False)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor
