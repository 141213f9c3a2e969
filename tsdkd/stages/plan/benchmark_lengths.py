"""Documents and tokens of each benchmark, so that a plan loads no benchmark."""

from tsdkd.stages.results.benchmark import Benchmark

_LENGTHS = {
    "gsm8k": (1_319, 1_164),
    "gsm-plus": (10_552, 1_149),  # tokens of gsm-plus:mini
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
    "musr": (756, 2_892),  # the mean of its three subjects
    "ifeval": (541, 72),
    "embedded": (360, 53),
    "aime24": (30, 160),
    "aime25": (30, 160),  # tokens of aime24
    "amc23": (40, 136),
    "math-500": (500, 128),
    "gpqa-diamond": (198, 250),  # tokens not measured: the data is gated
}
"""Documents of the evaluated split, and tokens read per document: the prompt with its shots, once per choice in
multiple-choice benchmarks. Measured by `benchmarks/lengths.py` with the embedded pair's tokenizer: the mean of 40
documents per subject, weighted by the sizes of the subjects."""


def benchmark_length(benchmark: Benchmark) -> tuple[int, int]:
    """(documents, tokens read per document); a variant that differs only in its metric has its benchmark's lengths."""
    return _LENGTHS.get(benchmark.name) or _LENGTHS[benchmark.base]
