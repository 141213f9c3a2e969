"""b. The objective at the paper's size: time and memory beside bare projections, TRL, Liger and the released formula.

    python -m benchmarks.gpu.b_objective [--out DIR] [--seconds 200] [--tiny]

8,192 response tokens, vocabulary 151,936, widths 1,536 and 5,120, bfloat16; forward and backward. A row that does not
fit into memory is measured at half the tokens, beside the bare projections of as many. Times are medians; "share of
peak" counts the products of the bare projections, in every row.

The roofline adds the products of both passes at the measured peak rate to the traffic between the products, which must
read both models' logits and write the gradient, at the measured bandwidth.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.gpu.device import (
    copy_bandwidth,
    interleaved_seconds,
    measure,
    open_figures,
    parse_options,
    peak_above,
    peak_flops,
)
from benchmarks.gpu.figures import Figure, Options, Target
from benchmarks.objective_rows import RESPONSE, ROWS, Inputs, make_inputs

BARE, PLAIN, KERNEL = "bare projections", "tsdkd", "tsdkd, compiled"
PEERS = [name for name in ROWS if name.startswith(("TRL", "Liger"))]
ORDER = [BARE, PLAIN, KERNEL, *PEERS, "released formula"]
SELECTED = 0.2
"""The fraction of tokens in the second pass: openers and uncertain tokens, a tenth each."""
UNCERTAIN = 0.1
"""The fraction of tokens whose gradient in the second pass has all entries of the vocabulary."""
BYTES = 2
"""Of a logit, and of its gradient."""
COLUMNS = ["seconds", "times bare", "least", "most", "share of peak", "peak GB above", "tokens", "TFLOP/s", "TB/s"]
TARGETS = [
    Target("seconds, in rooflines", lambda f: f[KERNEL]["seconds"] / f["roofline"]["seconds"], 1.1),
    Target("GB above the inputs", lambda f: f[KERNEL]["peak GB above"], 2.0),
    *[Target(f"seconds, in those of {peer}", lambda f, p=peer: _ratio(f, KERNEL, p), 1.0) for peer in PEERS],
    Target("seconds, in those without the kernel", lambda f: _ratio(f, KERNEL, PLAIN), 1.0),
]


def _ratio(figures: dict[str, Figure], name: str, other: str) -> float:
    """Of times per token; each is relative to the bare projections of its own rounds."""
    return float(figures[name]["times bare"]) / float(figures[other]["times bare"])


def bare_flops(sizes: argparse.Namespace) -> float:
    """Of the student's forward and backward products and the teacher's product."""
    student, teacher = sizes.widths
    return float(sizes.tokens * sizes.vocab * (6 * student + 2 * teacher))


def roofline(sizes: argparse.Namespace, options: Options) -> Figure:
    """Seconds that the chunked objective needs at least."""
    peak, bandwidth = peak_flops(options), copy_bandwidth(options)
    logits, student = sizes.tokens * sizes.vocab, sizes.widths[0]
    products = (bare_flops(sizes) + logits * student * (2 * SELECTED + 4 * UNCERTAIN)) / peak
    traffic = logits * BYTES * (3 + SELECTED + UNCERTAIN) / bandwidth
    seconds, share = products + traffic, bare_flops(sizes) / peak
    return {
        "seconds": seconds,
        "times bare": seconds / share,
        "share of peak": share / seconds,
        "TFLOP/s": peak / 1e12,
        "TB/s": bandwidth / 1e12,
    }


def measure_row(name: str, sizes: argparse.Namespace, peak: float, options: Options) -> Figure:
    """Time and memory of a row, in rounds with the bare projections."""
    x = make_inputs(sizes, sizes.tokens)

    def run(work: Callable[[Inputs], None]) -> None:
        for leaf in x.leaves:
            leaf.grad = None
        work(x)

    rows = {label: partial(run, ROWS[label]) for label in dict.fromkeys((BARE, name))}
    times = interleaved_seconds(rows, 2 if options.tiny else 7, options.device)
    ratios = [row / bare for row, bare in zip(times[name], times[BARE], strict=True)]
    grads = sum(leaf.nbytes for leaf in x.leaves) / 1e9
    for leaf in x.leaves:
        leaf.grad = None
    return {
        "seconds": statistics.median(times[name]),
        "times bare": statistics.median(ratios),
        "least": min(ratios),
        "most": max(ratios),
        "share of peak": bare_flops(sizes) / statistics.median(times[name]) / peak,
        "peak GB above": peak_above(partial(run, ROWS[name]), options.device) - grads,
        "tokens": sizes.tokens,
    }


def measure_what_fits(name: str, sizes: argparse.Namespace, peak: float, options: Options) -> Figure:
    """`measure_row`, at half the tokens as long as the device has too little memory."""
    while True:
        try:
            return measure_row(name, sizes, peak, options)
        except torch.OutOfMemoryError:
            if sizes.tokens <= RESPONSE:
                raise
        sizes = argparse.Namespace(**vars(sizes) | {"tokens": sizes.tokens // 2})


def main() -> None:
    options = parse_options(__doc__)
    tokens, vocab, widths = (2 * RESPONSE, 1000, (16, 24)) if options.tiny else (8192, 151936, (1536, 5120))
    sizes = argparse.Namespace(tokens=tokens, vocab=vocab, widths=widths, device=options.device, dtype="bfloat16")
    title = f"b. Objective: {tokens:,} tokens, vocabulary {vocab:,}, widths {widths[0]:,} and {widths[1]:,}, bfloat16"
    figures = open_figures("b_objective", title, COLUMNS, options, TARGETS)
    measure(figures, "roofline", partial(roofline, sizes, options))
    peak = float(figures.values.get("roofline", {}).get("TFLOP/s", "nan")) * 1e12
    for name in ORDER:
        measure(figures, name, partial(measure_what_fits, name, sizes, peak, options))
    figures.finish(["roofline", *ORDER])


if __name__ == "__main__":
    main()
