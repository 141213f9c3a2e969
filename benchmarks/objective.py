"""Time and peak memory of the whole objective beside the two bare head projections that any distillation needs.

    python benchmarks/objective.py [--tokens 512] [--vocab 151936] [--widths 384 640] [--device cpu] [--dtype float32]
                                   [--repeats 7] [--growth 8192] [--profile] [--rows ours ...] [--chunks cuda]

Rows: the bare projections (student forward and backward, teacher forward); the readable reference; the released
research code's formula (prefix sums, 90 % of the positions, one opener for the batch) on full logits with autograd;
ours, plain and compiled; and, where they are installed, TRL's chunked divergence and Liger-Kernel's chunked JSD, which
are one term of the three. Rounds interleave the rows, so that a machine's moods meet all; ratios are of medians.
Memory is the peak above inputs, weights and the weights' and inputs' gradients, each row in a process of its own.

glibc gives large buffers back to the system and faults them in again, which the rows with all logits pay for most;
with the recipes' settings (`. recipes/setup.sh`) it keeps them. Say which of the two you measured.
"""

import argparse
import gc
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from tsdkd.core import Head, TeacherHidden, TSDKDConfig, chunk_sizes, token_selective_loss_from_hidden, tsdkd_loss

RESPONSE = 256
"""Tokens a response."""


@dataclass
class Inputs:
    student: Tensor
    student_weight: Tensor
    teacher: Tensor
    teacher_weight: Tensor

    @property
    def mask(self) -> Tensor:
        return torch.ones(len(self.student) // RESPONSE, RESPONSE, dtype=torch.bool, device=self.student.device)

    @property
    def leaves(self) -> list[Tensor]:
        return [self.student, self.student_weight]


def make(o: argparse.Namespace, tokens: int) -> Inputs:
    generator = torch.Generator(o.device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=o.device).to(getattr(torch, o.dtype))

    student, teacher = o.widths
    return Inputs(  # logits of standard deviation 2
        normal(tokens, student).requires_grad_(),
        normal(o.vocab, student).mul_(2 * student**-0.5).requires_grad_(),
        normal(tokens, teacher),
        normal(o.vocab, teacher).mul_(2 * teacher**-0.5),
    )


def bare(x: Inputs) -> None:
    with torch.no_grad():
        teacher = x.teacher @ x.teacher_weight.T
    (x.student @ x.student_weight.T).backward(teacher)


def reference(x: Inputs) -> None:
    shape = (*x.mask.shape, -1)
    with torch.no_grad():
        teacher = (x.teacher @ x.teacher_weight.T).view(shape)
    tsdkd_loss((x.student @ x.student_weight.T).view(shape), teacher, x.mask, TSDKDConfig())[0].backward()


def released(x: Inputs, alpha: float = 0.1, beta: float = 0.9, k: int = 10, ratio: float = 0.1) -> None:
    shape = (*x.mask.shape, -1)
    with torch.no_grad():
        teacher = (x.teacher @ x.teacher_weight.T).view(shape).float()
    student = (x.student @ x.student_weight.T).view(shape).float()

    def entropy(logits: Tensor) -> Tensor:
        return -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)

    student_entropy, teacher_entropy = entropy(student), entropy(teacher)
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    log_beta = torch.log(torch.tensor([beta, 1 - beta], device=log_q.device))
    log_m = torch.logsumexp(torch.stack([log_p + log_beta[0], log_q + log_beta[1]]), 0)
    jsd = beta * (log_p.exp() * (log_p - log_m)).sum(-1) + (1 - beta) * (log_q.exp() * (log_q - log_m)).sum(-1)
    direct = (torch.sigmoid(student_entropy - teacher_entropy).detach() * jsd).mean()

    flat = student_entropy.detach().flatten()
    end = int((flat.cumsum(0) >= ratio * flat.sum()).nonzero()[0])
    opener = torch.arange(x.mask.shape[1], device=flat.device) <= end
    candidates = student.topk(k, -1).indices
    order = teacher.gather(-1, candidates).argsort(-1, descending=True)
    scores = student.gather(-1, candidates.gather(-1, order))
    nll = (scores.logcumsumexp(-1) - scores).sum(-1)
    indirect = nll[:, opener].mean()

    uncertain = student_entropy >= student_entropy.detach().quantile(ratio)
    (alpha * indirect + direct + student_entropy[uncertain].mean()).backward()


def ours(x: Inputs, compiled: bool = False) -> None:
    teacher = TeacherHidden(x.teacher, Head(x.teacher_weight))
    head = Head(x.student_weight)
    loss, _ = token_selective_loss_from_hidden(x.student, head, teacher, x.mask, TSDKDConfig(), compiled=compiled)
    loss.backward()


def ours_compiled(x: Inputs) -> None:
    ours(x, compiled=True)


def trl(x: Inputs) -> None:
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    rows = (x.student.unsqueeze(0), x.teacher.unsqueeze(0), x.student_weight, x.teacher_weight)
    _chunked_divergence_loss(*rows, x.mask.view(1, -1), beta=0.9)[0].backward()


def liger(x: Inputs) -> None:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.9)
    targets = torch.zeros(len(x.student), dtype=torch.long, device=x.student.device)
    loss(x.student, x.student_weight, x.teacher, x.teacher_weight, targets).backward()


ROWS: dict[str, Callable[[Inputs], None]] = {
    "bare projections": bare,
    "reference": reference,
    "released formula": released,
    "ours": ours,
    "ours, compiled": ours_compiled,
    "TRL, divergence alone": trl,
    "Liger, divergence alone": liger,
}


def timed(work: Callable[[Inputs], None], x: Inputs) -> float:
    for leaf in x.leaves:
        leaf.grad = None
    _wait(x)
    start = time.perf_counter()
    work(x)
    _wait(x)
    return time.perf_counter() - start


def chunk_as(device: str) -> None:
    """Let CPUs form the logits of as many tokens at a time as `device`."""
    threads = torch.get_num_threads() if device != "cpu" else 1
    chunk_sizes.CHUNK_BYTES["cpu"] = chunk_sizes.CHUNK_BYTES[device]
    chunk_sizes.BLOCK_LOGITS["cpu"] = chunk_sizes.BLOCK_LOGITS[device] // threads


def peak(work: Callable[[Inputs], None], o: argparse.Namespace, queue: Any) -> None:
    chunk_as(o.chunks)
    x = make(o, o.tokens)
    if work is ours_compiled:
        work(make(o, o.tokens))  # the kernel that is timed
    else:
        work(make(argparse.Namespace(**vars(o) | {"vocab": 1000}), RESPONSE))  # libraries load
    gc.collect()
    grads = sum(leaf.nbytes for leaf in x.leaves)
    if o.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work(x)
        queue.put((torch.cuda.max_memory_allocated() - before - grads) / 1e9)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        before = _status("VmRSS")
        work(x)
        queue.put((_status("VmHWM") - before - grads) / 1e9)


def available(o: argparse.Namespace) -> dict[str, Callable[[Inputs], None]]:
    """The rows that are wanted and run here; why another does not is printed."""
    found = {}
    x = make(o, RESPONSE)
    for name, work in ((name, work) for name, work in ROWS.items() if name in {*o.rows, next(iter(ROWS))}):
        try:
            work(x)
        except Exception as error:
            Console().print(f"{name}: left out ({type(error).__name__}: {str(error).splitlines()[0]})")
        else:
            found[name] = work
    return found


def _wait(x: Inputs) -> None:
    if x.student.is_cuda:
        torch.cuda.synchronize()


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def _show_growth(o: argparse.Namespace, rows: dict[str, Callable[[Inputs], None]]) -> None:
    few, many = make(o, o.tokens), make(o, o.growth)
    rates = {name: ([], []) for name in rows if name.startswith("ours")}
    for _ in range(max(3, o.repeats // 2)):
        for name, (short, long) in rates.items():
            short.append(timed(rows[name], few) / o.tokens * 1e3)
            long.append(timed(rows[name], many) / o.growth * 1e3)
    for name, (short, long) in rates.items():
        one, other = statistics.median(short), statistics.median(long)
        Console().print(
            f"{name}: {one:.2f} ms a token at {o.tokens}, {other:.2f} at {o.growth} ({other / one - 1:+.1%})"
        )


def _show_profile(o: argparse.Namespace, work: Callable[[Inputs], None]) -> None:
    """Where ours, plain, spends its time: its operations, longest first."""
    x = make(o, o.tokens)
    activity = torch.profiler.ProfilerActivity.CUDA if o.device == "cuda" else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profiler:
        work(x)
        _wait(x)
    on_device = "self_device_time_total" if o.device == "cuda" else "self_cpu_time_total"
    found = sorted(profiler.key_averages(), key=lambda event: -getattr(event, on_device))
    total = sum(getattr(event, on_device) for event in found)
    table = Table("operation", "share", "ms", "calls")
    for event in found[:12]:
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
    parser.add_argument("--growth", type=int, default=0, help="also time ours at so many tokens")
    parser.add_argument(
        "--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help="beside the bare one"
    )
    parser.add_argument("--chunks", choices=chunk_sizes.CHUNK_BYTES, default="cpu", help="sizes that a CPU takes over")
    parser.add_argument("--profile", action="store_true", help="also say where ours spends its time")
    o = parser.parse_args()
    if o.tokens % RESPONSE or o.growth % RESPONSE:
        parser.error(f"--tokens and --growth are made of responses of {RESPONSE} tokens")
    chunk_as(o.chunks)
    rows = available(o)
    x = make(o, o.tokens)
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for work in rows.values():
        timed(work, x)  # warm-up at this size
    for _ in range(o.repeats):
        for name, work in rows.items():
            seconds[name].append(timed(work, x))
    del x
    if o.device == "cuda":
        torch.cuda.empty_cache()
    base = statistics.median(seconds["bare projections"])
    context = multiprocessing.get_context("spawn")
    for setting in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):
        os.environ.pop(setting, None)  # what is freed shall be gone
    table = Table("", "seconds (min to max)", "times bare (min to max of rounds)", "peak GB above")
    for name, work in rows.items():
        queue = context.SimpleQueue()
        process = context.Process(target=peak, args=(work, o, queue))
        process.start()
        process.join()
        above = "failed" if process.exitcode else f"{queue.get():.2f}"
        found = seconds[name]
        ratios = [one / other for one, other in zip(found, seconds["bare projections"], strict=True)]
        table.add_row(
            name,
            f"{statistics.median(found):.3f} ({min(found):.3f} to {max(found):.3f})",
            f"{statistics.median(found) / base:.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
            above,
        )
    shape = f"{o.tokens} tokens, vocabulary {o.vocab:,}, widths {o.widths[0]} and {o.widths[1]}, {o.dtype}, {o.device}"
    Console().print(f"{shape}, {torch.get_num_threads()} threads", table)
    if o.growth:
        _show_growth(o, rows)
    if o.profile and "ours" in rows:
        _show_profile(o, rows["ours"])


if __name__ == "__main__":
    main()
