"""A comparison as tables of words, for the terminal, for pages, and to paste."""

from tsdkd.stages.results.compare import Comparison, Difference, Score

Table = tuple[str, list[str], list[list[str]]]
"""Title, columns, rows."""
SHOWN = ("teacher", "student", "tsdkd")
"""Of the paper's methods, where there is little room."""
ACCURACY = "accuracy ± standard error, %"
SIDE_BY_SIDE = 4
"""Models that a terminal has room for."""


def benchmark_tables(comparison: Comparison, methods: tuple[str, ...]) -> list[Table]:
    """Accuracies, beside the paper's rows of the same names and of those `methods`, and differences to the baseline."""
    differences = [_differences(comparison)] if any(comparison.differences.values()) else []
    many = bool(comparison.published) or len(comparison.scores) > SIDE_BY_SIDE
    accuracy = _beneath(comparison, methods) if many else _beside(comparison)
    return [accuracy, *differences]


def _beside(comparison: Comparison) -> Table:
    """A column for each model."""
    columns = comparison.scores
    rows = [[benchmark, *(_cell(row, benchmark) for row in columns.values())] for benchmark in comparison.benchmarks]
    return ACCURACY, ["benchmark", *columns], rows


def _beneath(comparison: Comparison, methods: tuple[str, ...]) -> Table:
    """A row for each model of a benchmark, with what the paper has for it."""
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
    return ACCURACY, ["benchmark", "model", "here", "paper"], rows


def _cell(row: dict[str, Score], benchmark: str) -> str:
    return _percent(row[benchmark]) if benchmark in row else ""


def _differences(comparison: Comparison) -> Table:
    rows = [
        [name, benchmark, _percent(d, "+"), str(d.wins), str(d.losses), str(d.documents), _p(d.p)]
        for name, found in comparison.differences.items()
        for benchmark, d in found.items()
    ]
    title = f"difference to {comparison.baseline} on the same documents, points"
    return title, ["model", "benchmark", "difference", "won", "lost", "of", "p"], rows


def held_out_tables(comparison: Comparison) -> list[Table]:
    """To the teacher, where it was measured."""
    rows = [
        [
            name,
            f"{near['kl']:.4f} ± {near['kl_stderr']:.4f}",
            f"{near['agreement']:.3f}",
            f"{near['entropy']:.3f}",
        ]
        for name, near in comparison.held_out.items()
    ]
    title = "held-out responses, nats per token"
    return [(title, ["model", "KL to teacher", "top-1 agreement", "entropy"], rows)] if rows else []


def truncation_notes(comparison: Comparison) -> list[str]:
    """Which models' answers and prompts were cut, where some were."""
    lines = []
    for name, scores in comparison.scores.items():
        for what, counts in (
            ("answers cut off at their limit", {benchmark: s.truncated for benchmark, s in scores.items()}),
            ("prompts cut to fit the context", {benchmark: s.prompts_cut for benchmark, s in scores.items()}),
        ):
            found = [
                f"{benchmark} {count} of {scores[benchmark].documents}" for benchmark, count in counts.items() if count
            ]
            if found:
                lines.append(f"{name}, {what}: {', '.join(found)}")
    return lines


def _percent(found: Score | Difference, sign: str = "") -> str:
    return f"{100 * found.value:{sign}.1f}" + ("" if found.stderr is None else f" ± {100 * found.stderr:.1f}")


def _p(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else "<0.001"
