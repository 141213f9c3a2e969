"""A comparison as a user reads it: on the terminal, or as Markdown, CSV or LaTeX to paste."""

from __future__ import annotations

import csv
import io
from typing import TYPE_CHECKING, Literal

from tsdkd.cli.console import show_pairs, show_table, show_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tsdkd.stages.evaluation.compare import Comparison, Difference, Score

Format = Literal["terminal", "markdown", "csv", "latex"]
Table = tuple[str, list[str], list[list[str]]]
"""Title, columns, rows."""
SHOWN = ("teacher", "student", "tsdkd")
"""Of the paper's methods, on the terminal."""


def show(comparison: Comparison, format_: Format) -> None:
    if format_ == "csv":
        show_text(_csv(comparison))
        return
    tables = [_accuracy(comparison, SHOWN if format_ == "terminal" else tuple(comparison.published))]
    tables += [_differences(comparison)] if any(comparison.differences.values()) else []
    tables += [_closeness(comparison)] if comparison.heldout else []
    if format_ != "terminal":
        show_text("\n".join((_markdown if format_ == "markdown" else _latex)(table) for table in tables))
        return
    for table in tables:
        show_table(*table)
    _show_cut(comparison)
    _show_answers(comparison)


def _accuracy(comparison: Comparison, methods: tuple[str, ...]) -> Table:
    columns = comparison.scores | {
        f"paper: {one}": comparison.published[one] for one in methods if comparison.published
    }
    rows = [
        [benchmark, *(_percent(row[benchmark]) if benchmark in row else "" for row in columns.values())]
        for benchmark in comparison.benchmarks
    ]
    return "accuracy ± standard error, %", ["benchmark", *columns], rows


def _differences(comparison: Comparison) -> Table:
    rows = [
        [name, benchmark, _percent(d, "+"), str(d.wins), str(d.losses), str(d.documents), _p(d.p)]
        for name, found in comparison.differences.items()
        for benchmark, d in found.items()
    ]
    title = f"difference to {comparison.baseline} on the same documents, points"
    return title, ["model", "benchmark", "difference", "won", "lost", "of", "p"], rows


def _closeness(comparison: Comparison) -> Table:
    rows = [
        [
            name,
            f"{near['kl']:.4f} ± {near['kl_stderr']:.4f}",
            f"{near['agreement']:.3f}",
            f"{near['entropy']:.3f}",
        ]
        for name, near in comparison.heldout.items()
    ]
    return "held-out responses, nats per token", ["model", "KL to teacher", "top-1 agreement", "entropy"], rows


def _show_cut(comparison: Comparison) -> None:
    for name, scores in comparison.scores.items():
        for what, counts in (
            ("answers cut off at their limit", {benchmark: s.truncated for benchmark, s in scores.items()}),
            ("prompts cut to fit the context", {benchmark: s.prompts_cut for benchmark, s in scores.items()}),
        ):
            found = [
                f"{benchmark} {count} of {scores[benchmark].documents}" for benchmark, count in counts.items() if count
            ]
            if found:
                show_text(f"{name}, {what}: {', '.join(found)}")


def _show_answers(comparison: Comparison) -> None:
    if comparison.heldout:
        asked = next(iter(comparison.heldout.values()))["prompt"]
        answers = [(name, near["answer"]) for name, near in comparison.heldout.items()]
        show_pairs("a held-out prompt, answered by all", [("prompt", asked), *answers])


def _percent(found: Score | Difference, sign: str = "") -> str:
    return f"{100 * found.value:{sign}.1f}" + ("" if found.stderr is None else f" ± {100 * found.stderr:.1f}")


def _p(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else "<0.001"


def _markdown(table: Table) -> str:
    title, columns, rows = table
    lines = [columns, ["---"] * len(columns), *rows]
    return f"{title}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _latex(table: Table) -> str:
    title, columns, rows = table
    lines = [" & ".join(map(_escaped, line)) + r" \\" for line in (columns, *rows)]
    body = "\n".join([lines[0], r"\hline", *lines[1:]])
    return f"% {title}\n\\begin{{tabular}}{{l{'r' * (len(columns) - 1)}}}\n{body}\n\\end{{tabular}}\n"


def _escaped(text: str) -> str:
    for plain, written in (("_", r"\_"), ("%", r"\%"), ("±", r"$\pm$"), ("<", "$<$")):
        text = text.replace(plain, written)
    return text


def _csv(comparison: Comparison) -> str:
    """One row for each model and benchmark; shares, not percent."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*_SCORE, *_DIFFERENCE])
    for name, scores in comparison.scores.items():
        for benchmark, s in scores.items():
            difference = comparison.differences.get(name, {}).get(benchmark)
            of_score = [s.value, s.stderr, s.documents, s.truncated, s.prompts_cut]
            writer.writerow([name, benchmark, *of_score, *_fields(difference)])
    for name, scores in comparison.published.items():
        writer.writerows([f"paper: {name}", one, round(s.value, 5), *[""] * 10] for one, s in scores.items())
    return file.getvalue()


_SCORE = ["model", "benchmark", "accuracy", "stderr", "documents", "truncated", "prompts_cut"]
_DIFFERENCE = ["difference", "difference_stderr", "p", "won", "lost", "compared"]


def _fields(difference: Difference | None) -> Sequence[object]:
    d = difference
    return [""] * len(_DIFFERENCE) if d is None else [d.value, d.stderr, d.p, d.wins, d.losses, d.documents]
