"""The device of the GPU scripts: its name, times, memory and peak rates. No other script calls `torch.cuda`."""

import gc
import os
import platform
import statistics
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from benchmarks.gpu.figures import ATTEMPTS, Figure, Figures, Options, Target, argument_parser

PACKAGES = ("torch", "triton", "transformers", "peft", "trl", "liger-kernel", "lm-eval", "bitsandbytes")
MATRIX = 8192
"""Side of the square matrices whose product shows the device's peak rate."""
COPIED_BYTES = 2**31
SECONDS = 200
"""No figure starts later, so that a script ends within four minutes."""


def parse_options(description: str | None) -> Options:
    """The options of a script that has no others."""
    parser = argument_parser(description, SECONDS)
    return options_of(parser, parser.parse_args())


def options_of(parser: ArgumentParser, arguments: Namespace) -> Options:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not arguments.tiny:
        parser.error("No GPU is visible. Give --tiny for a CPU.")
    return Options(arguments.out, arguments.tiny, arguments.seconds, device)


def open_figures(
    script: str,
    title: str,
    columns: Sequence[str],
    options: Options,
    targets: Sequence[Target] = (),
    attempts: float = ATTEMPTS,
) -> Figures:
    return Figures(script, title, columns, options, _environment(options), targets, attempts)


def measure(figures: Figures, name: str, work: Callable[[], Figure]) -> None:
    """`Figures.measure`, which frees the memory of the device afterwards."""
    device = figures.options.device
    figures.measure(name, work, lambda: is_working(device))
    gc.collect()  # models and trainers are parts of reference cycles
    if device == "cuda":
        torch.cuda.empty_cache()


def is_working(device: str) -> bool:
    """Whether the device still computes: after an illegal access, every later call of the process fails."""
    try:
        synchronize(device)
    except RuntimeError:
        return False
    return True


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


def peak_of(work: Callable[[], Any], device: str) -> float:
    """Peak memory in GB, with the memory that is in use before; NaN on a CPU."""
    if device != "cuda":
        work()
        return float("nan")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return float(torch.cuda.max_memory_allocated()) / 1e9


def peak_above(work: Callable[[], Any], device: str) -> float:
    """Peak memory in GB above the memory that is in use before; NaN on a CPU."""
    before = torch.cuda.memory_allocated() / 1e9 if device == "cuda" else 0.0
    return peak_of(work, device) - before


def peak_flops(options: Options) -> float:
    """FLOP/s of a product of two large bfloat16 matrices of random numbers."""
    side = 256 if options.tiny else MATRIX
    a, b = (torch.randn(side, side, device=options.device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * side**3 / median_seconds(lambda: a @ b, options.device, 10)


def copy_bandwidth(options: Options) -> float:
    """Bytes per second of a copy on the device, read and written."""
    source = torch.empty(2**20 if options.tiny else COPIED_BYTES, dtype=torch.uint8, device=options.device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_seconds(lambda: target.copy_(source), options.device, 10)


def _environment(options: Options) -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    name = torch.cuda.get_device_name() if options.device == "cuda" else f"{platform.machine()}, {os.cpu_count()} cores"
    date = datetime.now().astimezone().date().isoformat()
    return {"date": date, "device": name, "tiny": str(options.tiny), **versions}
