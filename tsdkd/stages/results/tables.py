"""A comparison as tables of text, for the terminal, for reports, and for other documents."""

from collections.abc import Sequence
from typing import Any

from tsdkd.stages.results.compare import Comparison, Score
from tsdkd.stages.results.paired import Difference

Table = tuple[str, list[str], list[list[str]]]
"""Title, columns, rows."""
MAIN_METHODS = ("teacher", "student", "tsdkd")
"""The paper's methods that a short table shows."""
HELD_OUT_COLUMNS = ("KL to teacher", "top-1 agreement", "entropy")
ACCURACY = "accuracy ± standard error, %"
MAX_MODEL_COLUMNS = 4
"""Models that fit side by side on a terminal."""


def benchmark_tables(comparison: Comparison, methods: tuple[str, ...]) -> list[Table]:
    """Accuracies, and differences to the baseline where two models share a benchmark.

    `methods`: rows of the paper to show besides those with the names of measured models.
    """
    differences = [_difference_table(comparison)] if any(comparison.differences.values()) else []
    by_row = bool(comparison.published) or len(comparison.scores) > MAX_MODEL_COLUMNS
    accuracies = _table_with_model_rows(comparison, methods) if by_row else _table_with_model_columns(comparison)
    return [accuracies, *_sampling_tables(comparison), *differences]


def comparison_tables(comparisons: Sequence[Comparison], methods: tuple[str, ...]) -> list[Table]:
    """The tables of the comparisons with each baseline; with one benchmark, a single table with a row for each model.

    `methods`: rows of the paper to show besides those with the names of measured models.
    """
    first, *others = comparisons
    if len(first.benchmarks) == 1 and not any(first.published.values()):
        one = _one_benchmark_table(first.benchmarks[0], comparisons)
        return [one, *_sampling_tables(first), *_held_out_tables_by_teacher(first)]
    more_differences = [_difference_table(comparison) for comparison in others if any(comparison.differences.values())]
    return [*benchmark_tables(first, methods), *more_differences, *held_out_tables(first)]


def _one_benchmark_table(benchmark: str, comparisons: Sequence[Comparison]) -> Table:
    """Accuracy, the difference to each baseline and its p, and the divergence from the teacher."""
    first = comparisons[0]
    shown = [comparison for comparison in comparisons if any(comparison.differences.values())]
    differences = [name for comparison in shown for name in (f"vs {comparison.baseline}", "p")]
    columns = ["model", "accuracy, %", *differences, *(HELD_OUT_COLUMNS if first.held_out else ())]
    rows = []
    for name, scores in first.scores.items():
        row = [name, _cell(scores, benchmark)]
        for comparison in shown:
            difference = comparison.differences.get(name, {}).get(benchmark)
            row += ["", ""] if difference is None else [_percent(difference, "+"), _p_value(difference.p)]
        if first.held_out:
            row += _held_out_cells(first.held_out[name]) if name in first.held_out else [""] * len(HELD_OUT_COLUMNS)
        rows.append(row)
    return f"{benchmark}: accuracy, differences in points, each ± standard error", columns, rows


def _table_with_model_columns(comparison: Comparison) -> Table:
    models = comparison.scores
    rows = [[benchmark, *(_cell(row, benchmark) for row in models.values())] for benchmark in comparison.benchmarks]
    return ACCURACY, ["benchmark", *models], rows


def _table_with_model_rows(comparison: Comparison, methods: tuple[str, ...]) -> Table:
    """A row per benchmark and model, with the paper's number for that name."""
    scores, published = comparison.scores, comparison.published
    names = [*scores, *(name for name in published if name in methods and name not in scores)]
    cells = [
        [benchmark, name, _cell(scores.get(name, {}), benchmark), _cell(published.get(name, {}), benchmark)]
        for benchmark in comparison.benchmarks
        for name in names
    ]
    rows = [row for row in cells if any(row[2:])]
    if not published:
        return ACCURACY, ["benchmark", "model", "accuracy"], [row[:3] for row in rows]
    return ACCURACY, ["benchmark", "model", "measured", "paper"], rows


def _cell(row: dict[str, Score], benchmark: str) -> str:
    if benchmark not in row:
        return ""
    samples = row[benchmark].samples
    return _percent(row[benchmark]) + (f" (avg@{samples})" if samples > 1 else "")


def _sampling_tables(comparison: Comparison) -> list[Table]:
    """pass@k and truncated responses of each benchmark and model with several samples; no table without one."""
    sampled = {
        (benchmark, name): row[benchmark]
        for benchmark in comparison.benchmarks
        for name, row in comparison.scores.items()
        if benchmark in row and row[benchmark].samples > 1
    }
    ks = sorted({k for score in sampled.values() for k in score.pass_at})
    rows = [
        [
            *key,
            *(_percent(score.pass_at[k]) if k in score.pass_at else "" for k in ks),
            f"{100 * score.truncated / score.responses:.1f}",
        ]
        for key, score in sampled.items()
    ]
    columns = ["benchmark", "model", *(f"pass@{k}" for k in ks), "truncated"]
    return [("sampled responses: pass@k ± standard error, truncated, %", columns, rows)] if rows else []


def _difference_table(comparison: Comparison) -> Table:
    rows = [
        [name, benchmark, _percent(d, "+"), str(d.wins), str(d.losses), str(d.documents), _p_value(d.p)]
        for name, differences in comparison.differences.items()
        for benchmark, d in differences.items()
    ]
    title = f"difference to {comparison.baseline} on the same documents, points"
    return title, ["model", "benchmark", "difference", "wins", "losses", "documents", "p"], rows


def held_out_tables(comparison: Comparison) -> list[Table]:
    """Divergence from the teacher, and from each of several; no table when it was not measured."""
    rows = [[name, *_held_out_cells(measures)] for name, measures in comparison.held_out.items()]
    whole = [("held-out responses, nats per token", ["model", *HELD_OUT_COLUMNS], rows)] if rows else []
    return [*whole, *_held_out_tables_by_teacher(comparison)]


def _held_out_tables_by_teacher(comparison: Comparison) -> list[Table]:
    """Divergence from each of several teachers on its own responses; no table with one teacher."""
    rows = [
        [teacher, name, *_held_out_cells(measures)]
        for name, of_model in comparison.held_out.items()
        for teacher, measures in of_model.get("teachers", {}).items()
    ]
    rows.sort(key=lambda row: row[0])
    return [("held-out responses by teacher", ["teacher", "model", *HELD_OUT_COLUMNS], rows)] if rows else []


def _held_out_cells(measures: dict[str, Any]) -> list[str]:
    return [
        f"{measures['kl']:.4f} ± {measures['kl_stderr']:.4f}",
        f"{measures['top1_agreement']:.3f}",
        f"{measures['entropy']:.3f}",
    ]


def truncation_notes(comparison: Comparison) -> list[str]:
    """Lines for each model: truncated responses, truncated prompts, and responses that a stop string ended."""
    notes = []
    for name, scores in comparison.scores.items():
        for cause, counts in (
            ("responses are truncated at their limit", {b: score.truncated for b, score in scores.items()}),
            ("prompts are truncated to fit the context", {b: score.prompts_truncated for b, score in scores.items()}),
            ("responses are ended by a stop string", {b: score.stopped for b, score in scores.items()}),
        ):
            listed = [f"{b} {count} of {scores[b].responses}" for b, count in counts.items() if count]
            if listed:
                notes.append(f"{name}: {cause} ({', '.join(listed)})")
    return notes


def _percent(estimate: Score | Difference, sign: str = "") -> str:
    return f"{100 * estimate.value:{sign}.1f}" + ("" if estimate.stderr is None else f" ± {100 * estimate.stderr:.1f}")


def _p_value(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else "<0.001"
