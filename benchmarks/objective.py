"""Measures time and peak memory of the objective beside the two bare head projections that any distillation needs.

    python benchmarks/objective.py [--tokens 512] [--vocab 151936] [--widths 384 640] [--device cpu] [--dtype float32]
                                   [--repeats 7] [--growth 8192] [--profile] [--rows tsdkd ...] [--chunks cuda]

Rows: the bare projections (student forward and backward, teacher forward); the readable reference; the released
research code's formula (prefix sums, 90 % of the positions, one opener for the batch) on full logits with autograd;
tsdkd's chunked objective, plain and compiled; and, where they are installed, TRL's chunked divergence and
Liger-Kernel's chunked JSD and fused JSD (a Triton kernel), which are one of the three terms. Rounds interleave the
rows, so that changes of the machine's speed affect all of them; ratios are of medians. Memory is the peak above inputs,
weights and the gradients of both, each row in its own process.

On a CPU glibc keeps freed memory, as in the commands. Where the environment sets glibc's allocator (MALLOC_...), it
decides; without keeping, buffers are faulted in again, which costs most in the rows with all logits. Memory is measured
without keeping.
"""

import argparse
import gc
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.objective_rows import RESPONSE, ROWS, Inputs, make_inputs, tsdkd_compiled
from tsdkd.core import chunk_sizes
from tsdkd.stages.models.allocator import keep_freed_memory


def measure_seconds(work: Callable[[Inputs], None], x: Inputs) -> float:
    for leaf in x.leaves:
        leaf.grad = None
    _wait(x)
    start = time.perf_counter()
    work(x)
    _wait(x)
    return time.perf_counter() - start


def use_sizes_of(device: str) -> None:
    """Make CPUs work on as many tokens at a time as `device`."""
    threads = torch.get_num_threads() if device != "cpu" else 1
    chunk_sizes.CHUNK_BYTES["cpu"] = chunk_sizes.CHUNK_BYTES[device]
    chunk_sizes.BLOCK_LOGITS["cpu"] = chunk_sizes.BLOCK_LOGITS[device] // threads


def measure_peak(work: Callable[[Inputs], None], o: argparse.Namespace, queue: Any) -> None:
    use_sizes_of(o.chunks)
    x = make_inputs(o, o.tokens)
    if work is tsdkd_compiled:
        work(make_inputs(o, o.tokens))  # compiles for this size
    else:
        work(make_inputs(argparse.Namespace(**vars(o) | {"vocab": 1000}), RESPONSE))  # loads libraries
    gc.collect()
    grads = sum(leaf.nbytes for leaf in x.leaves)
    if o.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work(x)
        queue.put((torch.cuda.max_memory_allocated() - before - grads) / 1e9)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        before = _status("VmRSS")
        work(x)
        queue.put((_status("VmHWM") - before - grads) / 1e9)


def select_rows(o: argparse.Namespace) -> dict[str, Callable[[Inputs], None]]:
    """The requested rows that run on this machine; prints why a row is skipped."""
    rows = {}
    x = make_inputs(o, RESPONSE)
    for name, work in ((name, work) for name, work in ROWS.items() if name in {*o.rows, next(iter(ROWS))}):
        try:
            work(x)
        except Exception as error:
            Console().print(f"{name}: skipped ({type(error).__name__}: {str(error).splitlines()[0]})")
        else:
            rows[name] = work
    return rows


def _wait(x: Inputs) -> None:
    if x.student.is_cuda:
        torch.cuda.synchronize()


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def _show_growth(o: argparse.Namespace, rows: dict[str, Callable[[Inputs], None]]) -> None:
    few, many = make_inputs(o, o.tokens), make_inputs(o, o.growth)
    rates = {name: ([], []) for name in rows if name.startswith("tsdkd")}
    for _ in range(max(3, o.repeats // 2)):
        for name, (short, long) in rates.items():
            short.append(measure_seconds(rows[name], few) / o.tokens * 1e3)
            long.append(measure_seconds(rows[name], many) / o.growth * 1e3)
    for name, (short, long) in rates.items():
        few_rate, many_rate = statistics.median(short), statistics.median(long)
        change = many_rate / few_rate - 1
        Console().print(
            f"{name}: {few_rate:.2f} ms per token at {o.tokens}, {many_rate:.2f} at {o.growth} ({change:+.1%})"
        )


def _show_profile(o: argparse.Namespace, work: Callable[[Inputs], None]) -> None:
    """Print the operations of the plain chunked objective, longest first."""
    x = make_inputs(o, o.tokens)
    activity = torch.profiler.ProfilerActivity.CUDA if o.device == "cuda" else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profiler:
        work(x)
        _wait(x)
    on_device = "self_device_time_total" if o.device == "cuda" else "self_cpu_time_total"
    events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, on_device))
    total = sum(getattr(event, on_device) for event in events)
    table = Table("operation", "of total", "ms", "calls")
    for event in events[:12]:
        spent = getattr(event, on_device)
        table.add_row(event.key, f"{spent / total:.1%}", f"{spent / 1e3:,.0f}", str(event.count))
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--widths", type=int, nargs=2, default=(384, 640), metavar=("STUDENT", "TEACHER"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--growth", type=int, default=0, help="also time tsdkd at this many tokens")
    parser.add_argument(
        "--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help="rows beside the bare projections"
    )
    parser.add_argument(
        "--chunks", choices=chunk_sizes.CHUNK_BYTES, default="cpu", help="device whose chunk sizes a CPU uses"
    )
    parser.add_argument("--profile", action="store_true", help="also list the operations that take most time")
    o = parser.parse_args()
    if o.tokens % RESPONSE or o.growth % RESPONSE:
        parser.error(f"Give multiples of {RESPONSE} for --tokens and --growth.")
    use_sizes_of(o.chunks)
    if o.device == "cpu":
        keep_freed_memory()
    rows = select_rows(o)
    x = make_inputs(o, o.tokens)
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for work in rows.values():
        measure_seconds(work, x)  # warm-up at this size
    for _ in range(o.repeats):
        for name, work in rows.items():
            seconds[name].append(measure_seconds(work, x))
    del x
    if o.device == "cuda":
        torch.cuda.empty_cache()
    base = statistics.median(seconds["bare projections"])
    context = multiprocessing.get_context("spawn")
    table = Table("", "seconds (min to max)", "times bare (min to max of rounds)", "peak GB above")
    for name, work in rows.items():
        queue = context.SimpleQueue()
        process = context.Process(target=measure_peak, args=(work, o, queue))
        process.start()
        process.join()
        peak_above = "failed" if process.exitcode else f"{queue.get():.2f}"
        times = seconds[name]
        ratios = [row_time / bare_time for row_time, bare_time in zip(times, seconds["bare projections"], strict=True)]
        table.add_row(
            name,
            f"{statistics.median(times):.3f} ({min(times):.3f} to {max(times):.3f})",
            f"{statistics.median(times) / base:.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
            peak_above,
        )
    shape = f"{o.tokens} tokens, vocabulary {o.vocab:,}, widths {o.widths[0]} and {o.widths[1]}, {o.dtype}, {o.device}"
    Console().print(f"{shape}, {torch.get_num_threads()} threads", table)
    if o.growth:
        _show_growth(o, rows)
    if o.profile and "tsdkd" in rows:
        _show_profile(o, rows["tsdkd"])


if __name__ == "__main__":
    main()
