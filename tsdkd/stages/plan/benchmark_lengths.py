"""How long the benchmarks are, for an estimate before any of them is loaded."""

from tsdkd.stages.results.benchmarks import Benchmark

_LENGTHS = {
    "gsm8k": (1_319, 1_164),
    "gsm-plus": (10_552, 1_149),  # tokens as of its small set
    "gsm-plus:mini": (2_400, 1_149),
    "math": (5_000, 520),
    "math:minerva": (5_000, 846),
    "mmlu-pro-math": (1_351, 1_985),
    "mmlu-stem": (3_153, 614),
    "sciq": (1_000, 644),
    "mbpp": (500, 160),
    "mbpp:base": (500, 966),
    "bbh": (6_511, 1_005),
    "bbh:direct": (6_511, 466),
    "bbh:choice": (5_761, 2_756),
    "musr": (756, 2_892),  # its three subjects alike
    "ifeval": (541, 72),
    "embedded": (360, 53),
}
"""Documents of the split that is measured, and tokens read for one: its prompt with shots, where choices are compared
once a choice. By `benchmarks/lengths.py`, real rows and the embedded pair's tokenizer: the mean of 40 documents a
subject, subjects by their size."""


def benchmark_length(benchmark: Benchmark) -> tuple[int, int]:
    """Documents, and tokens read for one; a variant that only judges otherwise has its benchmark's."""
    return _LENGTHS.get(benchmark.name) or _LENGTHS[benchmark.base]
