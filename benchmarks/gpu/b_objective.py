"""b. The objective at the paper's size: time and memory beside bare projections, TRL, Liger and the released formula.

    python benchmarks/gpu/b_objective.py [--out DIR] [--seconds 240] [--tiny]

8,192 response tokens, vocabulary 151,936, widths 1,536 and 5,120, bfloat16; forward and backward. The roofline adds the
products of both passes at the measured peak rate and the vocabulary-sized traffic at the measured bandwidth.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial

from benchmarks.gpu.common import (
    Figure,
    Figures,
    Options,
    copy_bandwidth,
    interleaved_seconds,
    parse_options,
    peak_above,
    peak_flops,
)
from benchmarks.objective import RESPONSE, ROWS, Inputs, make_inputs

BARE = "bare projections"
SECOND_PASS = 0.2
"""The fraction of tokens in the second pass: openers and uncertain tokens, a tenth each."""
BYTES_PER_LOGIT = 14
"""bfloat16: both models' logits are written and read, the gradient is written and read by two products."""


def roofline(sizes: argparse.Namespace, options: Options) -> Figure:
    """Seconds that the chunked objective needs at least."""
    flops, bandwidth = peak_flops(options), copy_bandwidth(options)
    (student, teacher), logits = sizes.widths, sizes.tokens * sizes.vocab
    bare = logits * (6 * student + 2 * teacher)
    products = (bare + SECOND_PASS * logits * 6 * student) / flops
    traffic = logits * BYTES_PER_LOGIT / bandwidth
    return {"seconds": products + traffic, "times bare": (products + traffic) * flops / bare, "TFLOP/s": flops / 1e12}


def measure_row(name: str, x: Inputs, options: Options) -> Figure:
    """Time and memory of a row, in rounds with the bare projections."""

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
        "peak GB above": peak_above(partial(run, ROWS[name]), options.device) - grads,
    }


def main() -> None:
    options = parse_options(__doc__)
    tokens, vocab, widths = (2 * RESPONSE, 1000, (16, 24)) if options.tiny else (8192, 151936, (1536, 5120))
    sizes = argparse.Namespace(tokens=tokens, vocab=vocab, widths=widths, device=options.device, dtype="bfloat16")
    figures = Figures("b_objective", options)
    figures.measure("roofline", lambda: roofline(sizes, options))
    order = [BARE, "tsdkd", "tsdkd, compiled", "TRL, divergence alone", "Liger, divergence alone", "released formula"]
    x = make_inputs(sizes, tokens)
    for name in order:
        figures.measure(name, partial(measure_row, name, x, options))
    columns = ["seconds", "times bare", "least", "most", "peak GB above", "TFLOP/s"]
    title = f"objective: {tokens:,} tokens, vocabulary {vocab:,}, widths {widths[0]:,} and {widths[1]:,}, bfloat16"
    figures.finish(title, columns, ["roofline", *order])


if __name__ == "__main__":
    main()
