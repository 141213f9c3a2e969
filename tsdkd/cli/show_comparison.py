"""A comparison as a user reads it: on the terminal, or as Markdown, CSV or LaTeX to paste."""

from __future__ import annotations

import csv
import io
from typing import TYPE_CHECKING, Literal

from tsdkd.cli.console import show_pairs, show_table, show_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tsdkd.stages.results.compare import Comparison, Difference
    from tsdkd.stages.results.tables import Table

Format = Literal["terminal", "markdown", "csv", "latex"]


def show_comparison(comparison: Comparison, format_: Format) -> None:
    if format_ == "csv":
        show_text(_csv(comparison))
        return
    from tsdkd.stages.results.tables import MAIN_METHODS, benchmark_tables, held_out_tables, truncation_notes

    methods = MAIN_METHODS if format_ == "terminal" else tuple(comparison.published)
    found = [*benchmark_tables(comparison, methods), *held_out_tables(comparison)]
    if format_ != "terminal":
        notes = [
            f"{'%' if format_ == 'latex' else '-'} {line}"
            for line in (*comparison.notes, *truncation_notes(comparison))
        ]
        show_text("\n".join([*((_markdown if format_ == "markdown" else _latex)(table) for table in found), *notes]))
        return
    for table in found:
        show_table(*table)
    for line in (*comparison.notes, *truncation_notes(comparison)):
        show_text(line)
    _show_answers(comparison)


def _show_answers(comparison: Comparison) -> None:
    if comparison.held_out:
        asked = next(iter(comparison.held_out.values()))["prompt"]
        answers = [(name, near["response"]) for name, near in comparison.held_out.items()]
        show_pairs("a held-out prompt, answered by all", [("prompt", asked), *answers])


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
            of_score = [s.value, s.stderr, s.documents, s.truncated, s.prompts_truncated]
            writer.writerow([name, benchmark, *of_score, *_fields(difference)])
    for name, scores in comparison.published.items():
        writer.writerows([f"paper: {name}", one, round(s.value, 5), *[""] * 10] for one, s in scores.items())
    return file.getvalue()


_SCORE = ["model", "benchmark", "accuracy", "stderr", "documents", "truncated", "prompts_truncated"]
_DIFFERENCE = ["difference", "difference_stderr", "p", "wins", "losses", "compared_documents"]


def _fields(difference: Difference | None) -> Sequence[object]:
    d = difference
    return [""] * len(_DIFFERENCE) if d is None else [d.value, d.stderr, d.p, d.wins, d.losses, d.documents]
