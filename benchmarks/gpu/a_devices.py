"""a. Correctness on the device: the objective and its kernel, and one run of every stage, beside the same on the CPU.

    python -m benchmarks.gpu.a_devices [--out DIR] [--seconds 200] [--tiny]

The objective is compared with the reference on the CPU in float64: the reference itself, the chunked objective, the
comparison of two models' logits by itself, and both with the Triton kernel. The stages run twice on tiny float32
models: on the device, and in a process that sees no GPU; scores, metrics and weights are compared. Sampled ids depend
on the device, so both score and train on the rollouts that the device sampled. Figures are the largest differences;
beyond its bound a row fails.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.gpu.device import measure, open_figures, parse_options
from benchmarks.gpu.figures import Figure
from benchmarks.gpu.objective_cases import cases
from benchmarks.gpu.stages import COMPARABLE, ON_DEVICE, Stages


def main() -> None:
    options = parse_options(__doc__)
    columns = ["result", "difference", "bound", "accuracy"]
    figures = open_figures("a_devices", "a. Correctness on the device", columns, options)
    rows: dict[str, Callable[[], Figure]] = {
        case.name: partial(case.measure, options.device) for case in cases(options)
    }
    with TemporaryDirectory() as directory:
        stages = Stages(Path(directory))
        rows |= {name: partial(stages.on_device, name) for name in ON_DEVICE}
        rows |= {name: partial(stages.compare, name) for name in COMPARABLE}
        rows |= {"resume": stages.resume, "eval": stages.evaluate, "held-out divergence": stages.held_out}
        for name, work in rows.items():
            measure(figures, name, work)
    figures.finish(list(rows))


if __name__ == "__main__":
    main()
