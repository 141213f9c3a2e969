"""Shared by the GPU scripts: arguments, figures that outlive an interruption, timing, memory and tables."""

import argparse
import json
import os
import platform
import statistics
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

Figure = dict[str, float | str]
PACKAGES = ("torch", "triton", "transformers", "peft", "trl", "liger-kernel", "lm-eval")
MATRIX = 8192
"""Side of the square matrices whose product shows the device's peak rate."""
screen = Console(width=160, highlight=False)


@dataclass
class Options:
    """The arguments of every script."""

    out: Path
    """Directory of the JSON files."""
    tiny: bool
    """Sizes that a CPU computes in seconds."""
    seconds: float
    """No figure is begun after this time."""
    device: str = field(default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu")
    started: float = field(default_factory=time.monotonic)

    @property
    def is_late(self) -> bool:
        return time.monotonic() - self.started > self.seconds


def parse_options(description: str | None) -> Options:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-figures"), help="directory of the JSON files")
    parser.add_argument("--tiny", action="store_true", help="sizes that a CPU computes in seconds")
    parser.add_argument("--seconds", type=float, default=240, help="begin no figure after this time")
    options = Options(**vars(parser.parse_args()))
    if options.device == "cpu" and not options.tiny:
        parser.error("No GPU is visible. Give --tiny for a CPU.")
    return options


class Figures:
    """The figures of one script by name, in a JSON file. A figure that the file holds is not measured again."""

    def __init__(self, script: str, options: Options) -> None:
        self.options, self.path = options, options.out / f"{script}.json"
        environment = _environment(options)
        self.content: dict[str, Any] = {"environment": environment, "figures": {}, "failed": {}}
        if self.path.exists():
            self.content = json.loads(self.path.read_text())
            if self.content["environment"] | {"date": ""} != environment | {"date": ""}:
                raise SystemExit(
                    f"{self.path} was measured elsewhere: {self.content['environment']}. Name another --out."
                )

    @property
    def values(self) -> dict[str, Figure]:
        measured: dict[str, Figure] = self.content["figures"]
        return measured

    def measure(self, name: str, work: Callable[[], Figure]) -> None:
        """Measure and save one figure; an error is saved as its traceback, and the next figure begins."""
        if name in self.values:
            return
        if self.options.is_late:
            screen.print(f"{name}: not begun, the time is over")
            return
        start = time.monotonic()
        try:
            figure = work()
        except Exception as error:  # whatever a kernel, a driver or a library raises
            self.content["failed"][name] = traceback.format_exc()
            screen.print(f"{name}: failed ({type(error).__name__}: {str(error).splitlines()[:1]})", markup=False)
        else:
            self.content["failed"].pop(name, None)
            self.values[name] = figure
            screen.print(f"{name}: {figure} ({time.monotonic() - start:.0f} s)", markup=False)
        if self.options.device == "cuda":
            torch.cuda.empty_cache()
        self.save()

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.content, indent=1) + "\n")
        temporary.replace(self.path)

    def finish(self, title: str, columns: Sequence[str], expected: Sequence[str]) -> None:
        """Print the table; exit with 1 if a figure failed or is missing."""
        table = Table("", *columns, title=title)
        for name, figure in self.values.items():
            table.add_row(name, *(_format(figure.get(column)) for column in columns))
        screen.print(f"{self.content['environment']}", markup=False)
        screen.print(table)
        for name, text in self.content["failed"].items():
            screen.print(f"{name} failed:\n{text}", markup=False)
        raise SystemExit(int(any(name not in self.values for name in expected)))


def _format(value: float | str | None) -> str:
    return "" if value is None else value if isinstance(value, str) else f"{value:.4g}"


def _environment(options: Options) -> dict[str, str]:
    on_gpu = options.device == "cuda"
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    device = torch.cuda.get_device_name() if on_gpu else f"{platform.machine()}, {os.cpu_count()} cores"
    return {
        "date": datetime.now().astimezone().date().isoformat(),
        "device": device,
        "tiny": str(options.tiny),
        **versions,
    }


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_of(work: Callable[[], Any], device: str) -> float:
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def interleaved_seconds(rows: Mapping[str, Callable[[], Any]], repeats: int, device: str) -> dict[str, list[float]]:
    """Times of each row, in rounds after a warm-up, so that changes of the clock affect all rows."""
    for work in rows.values():
        work()
    times: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(repeats):
        for name, work in rows.items():
            times[name].append(seconds_of(work, device))
    return times


def median_seconds(work: Callable[[], Any], device: str, repeats: int = 5) -> float:
    return statistics.median(interleaved_seconds({"": work}, repeats, device)[""])


def peak_above(work: Callable[[], Any], device: str) -> float:
    """GB above the memory that is in use before; NaN on a CPU."""
    if device == "cpu":
        return float("nan")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return float(torch.cuda.max_memory_allocated() - before) / 1e9


def peak_flops(options: Options) -> float:
    """FLOP/s of a product of two large bfloat16 matrices of random numbers."""
    side = 256 if options.tiny else MATRIX
    a, b = (torch.randn(side, side, device=options.device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * side**3 / median_seconds(lambda: a @ b, options.device, 10)


def copy_bandwidth(options: Options) -> float:
    """Bytes per second of a copy on the device, read and written."""
    source = torch.empty(2**20 if options.tiny else 2**31, dtype=torch.uint8, device=options.device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_seconds(lambda: target.copy_(source), options.device, 10)
