"""A comparison on the terminal, or as Markdown, CSV or LaTeX to paste."""

from __future__ import annotations

import csv
import io
from typing import TYPE_CHECKING, Literal

from tsdkd.cli.console import show_pairs, show_table, show_text
from tsdkd.printable import escape_line, escape_markdown

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tsdkd.stages.results.compare import Comparison
    from tsdkd.stages.results.paired import Difference
    from tsdkd.stages.results.tables import Table

Format = Literal["terminal", "markdown", "csv", "latex"]


def show_comparison(comparisons: Sequence[Comparison], format_: Format) -> None:
    """Show the comparisons of the same results with each baseline."""
    if format_ == "csv":
        show_text(_csv(comparisons))
        return
    from tsdkd.stages.results.tables import MAIN_METHODS, comparison_tables, truncation_notes

    first = comparisons[0]
    tables = comparison_tables(comparisons, MAIN_METHODS if format_ == "terminal" else tuple(first.published))
    notes = [*dict.fromkeys(note for comparison in comparisons for note in comparison.notes), *truncation_notes(first)]
    if format_ != "terminal":
        lines = [f"% {escape_line(line)}" if format_ == "latex" else f"- {escape_markdown(line)}" for line in notes]
        show_text("\n".join([*((_markdown if format_ == "markdown" else _latex)(table) for table in tables), *lines]))
        return
    for table in tables:
        show_table(*table)
    for line in notes:
        show_text(escape_line(line))
    _show_responses(first)


def _show_responses(comparison: Comparison) -> None:
    if comparison.held_out:
        prompt = next(iter(comparison.held_out.values()))["prompt"]
        responses = [(name, measured["response"]) for name, measured in comparison.held_out.items()]
        show_pairs("responses to a held-out prompt", [("prompt", prompt), *responses])


def _markdown(table: Table) -> str:
    title, columns, rows = table
    head, *body = ([*map(escape_markdown, line)] for line in (columns, *rows))
    lines = [head, ["---"] * len(columns), *body]
    return f"{escape_markdown(title)}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _latex(table: Table) -> str:
    title, columns, rows = table
    lines = [" & ".join(map(_escape_latex, line)) + r" \\" for line in (columns, *rows)]
    body = "\n".join([lines[0], r"\hline", *lines[1:]])
    return f"% {escape_line(title)}\n\\begin{{tabular}}{{l{'r' * (len(columns) - 1)}}}\n{body}\n\\end{{tabular}}\n"


def _escape_latex(text: str) -> str:
    """Escape a text for LaTeX, in a cell of a table too."""
    return escape_line(text).translate(_LATEX)


def _csv(comparisons: Sequence[Comparison]) -> str:
    """One row for each baseline, model and benchmark; values are fractions, not percent.

    An apostrophe precedes a name that a spreadsheet would take for a formula.
    """
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*_SCORE_COLUMNS, *_DIFFERENCE_COLUMNS])
    for comparison in comparisons:
        for name, scores in comparison.scores.items():
            for benchmark, s in scores.items():
                difference = comparison.differences.get(name, {}).get(benchmark)
                most = s.pass_at.get(s.samples)
                score = [
                    s.value,
                    s.stderr,
                    s.documents,
                    s.samples,
                    most.value if most else "",
                    most.stderr if most else "",
                ]
                score += [s.truncated, s.prompts_truncated, s.stopped]
                cells = _difference_cells(difference, _escape_formula(comparison.baseline))
                writer.writerow([_escape_formula(name), benchmark, *score, *cells])
    for name, published in comparisons[0].published.items():
        writer.writerows(
            [
                f"paper: {name}",
                benchmark,
                round(s.value, 5),
                *[""] * (len(_SCORE_COLUMNS) + len(_DIFFERENCE_COLUMNS) - 3),
            ]
            for benchmark, s in published.items()
        )
    return file.getvalue()


def _escape_formula(name: str) -> str:
    return f"'{name}" if name.startswith(("=", "+", "-", "@", "\t", "\r")) else name


_LATEX = str.maketrans(
    {
        **{character: f"\\{character}" for character in "_%&#${}"},
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "`": r"\textasciigrave{}",
        "±": r"$\pm$",
        "≤": r"$\le$",
        "<": "$<$",
        ">": "$>$",
        "|": "$|$",
    }
)
_SCORE_COLUMNS = [
    *("model", "benchmark", "accuracy", "stderr", "documents", "samples", "pass_at_samples", "pass_at_samples_stderr"),
    *("truncated", "prompts_truncated", "stopped"),
]
_DIFFERENCE_COLUMNS = ["baseline", "difference", "difference_stderr", "p", "wins", "losses", "compared_documents"]


def _difference_cells(difference: Difference | None, baseline: str) -> Sequence[object]:
    if difference is None:
        return [""] * len(_DIFFERENCE_COLUMNS)
    d = difference
    return [baseline, d.value, d.stderr, d.p, d.wins, d.losses, d.documents]
