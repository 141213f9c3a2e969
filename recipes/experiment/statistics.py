"""Seeds as replicates: means with 95 % intervals by Student's t, differences paired by seed, and their tests."""

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev

from scipy.stats import t as student_t

Runs = dict[int, dict[str, float]]
"""Measures by name, for each seed."""


def format_interval(values: Sequence[float], digits: int = 1) -> str:
    """Mean ± half of the 95 % interval; one value has no interval."""
    return f"{fmean(values):.{digits}f}" + (f" ± {half_interval(values):.{digits}f}" if len(values) > 1 else "")


def half_interval(values: Sequence[float]) -> float:
    """Half of the 95 % interval of the mean; 0 for one value."""
    if len(values) == 1:
        return 0.0
    return float(student_t.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5


def paired_differences(runs: Runs, reference: Runs, measure: str) -> list[float]:
    """The differences of the seeds for which both have the measure."""
    return [
        run[measure] - reference[seed][measure]
        for seed, run in runs.items()
        if measure in run and measure in reference.get(seed, {})
    ]


def paired_p(differences: Sequence[float]) -> float:
    """Two-sided p of a mean of 0, by Student's t; 1 for fewer than two differences."""
    if len(differences) < 2 or not any(differences):
        return 1.0
    error = stdev(differences) / len(differences) ** 0.5
    return 2 * float(student_t.sf(abs(fmean(differences)) / error, len(differences) - 1)) if error else 0.0


def holm(values: Mapping[str, float]) -> dict[str, float]:
    """Holm's p-values, which keep the chance of any false difference among all at the level of one."""
    adjusted: dict[str, float] = {}
    largest = 0.0
    for rank, (name, p) in enumerate(sorted(values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, (len(values) - rank) * p))
        adjusted[name] = largest
    return adjusted
