"""Terminal output of `tsdkd inspect`: coloured text and tables, through a pager on a terminal."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from tsdkd.cli.console import out, show_pairs, show_table
from tsdkd.stages.inspect.aggregate import Aggregate, Histogram
from tsdkd.stages.inspect.response import ENTROPY_LEVELS, InspectedResponse, InspectedToken, TokenScores
from tsdkd.stages.inspect.token_texts import show_whitespace

COLOURS = ("", "black on #fff2b3", "black on #ffd97a", "black on #ffb65c", "black on #ff8f5e", "black on #ff6b6b")
"""From below the first of `ENTROPY_LEVELS` to above the last; legible on light and dark terminals."""
OPENER_END = "┃"
CONTEXT = "⟦⟧"
"""Around the context between two turns."""
BAR_LENGTH = 24
"""Characters of the longest bar."""
POSITION_ROWS = 12
"""Rows in the table of positions, evenly spread."""


def show_response(response: InspectedResponse, positions: range | None = None) -> None:
    """Print the prompt, the coloured response, and a table of its tokens (None: at all positions)."""
    with _pager():
        show_pairs("response", response.summary)
        for role, content in response.messages:
            out.print(Text.assemble((f"{role}: ", "dim"), content))
        out.print()
        out.print(_coloured(response))
        out.print()
        out.print(_legend(has_context=any(token.context for token in response.tokens)))
        tokens = [token for token in response.tokens if positions is None or token.position in positions]
        out.print(_token_table(tokens, compared=response.after is not None))


def show_aggregate(aggregate: Aggregate) -> None:
    """Print the summary, the mean entropies by position, and the histograms."""
    with _pager():
        show_pairs("selection", aggregate.summary)
        _show_entropy_by_position(aggregate)
        if aggregate.objective.alpha:
            _show_opener_lengths(aggregate)
        if aggregate.has_gate:
            _show_histogram("gate weights", aggregate.gates)
        _show_histogram("agreement of student and teacher (Kendall's tau)", aggregate.agreement)
        if aggregate.captured_mass.counts.any():
            _show_histogram("captured mass", aggregate.captured_mass)


@contextmanager
def _pager() -> Iterator[None]:
    """Page the output on a terminal; `less` keeps the colours, and quits when the text fits on one screen."""
    if not (out.is_terminal and sys.stdin.isatty()):
        yield
        return
    os.environ.setdefault("LESS", "-FRX")
    with out.pager(styles=True):
        yield


def _coloured(response: InspectedResponse) -> Text:
    text = Text()
    for token in response.tokens:
        if token.context:
            text.append(f"{CONTEXT[0]}{token.context}{CONTEXT[1]}", "dim")
        style = COLOURS[token.before.level] + " bold underline" * token.in_entropy_term
        text.append(token.text.replace("\n", "↵\n"), style)
        if token.ends_opener:
            text.append(OPENER_END, "bold cyan")
    return text


def _legend(*, has_context: bool) -> Text:
    text = Text("student's entropy (nats): ")
    for style, low, high in zip(COLOURS, (0.0, *ENTROPY_LEVELS), (*ENTROPY_LEVELS, None), strict=True):
        text.append(f" {low:g}{'+' if high is None else f'-{high:g}'} ", style)
    text.append(f"\n{OPENER_END} end of the opener, o in the table: indirect term (ranking)\n")
    if has_context:
        text.append(f"{CONTEXT} context between turns: read, not learned\n", "dim")
    text.append("underlined", "bold underline")
    text.append(", e in the table: entropy term\n")
    text.append("gate: weight of the direct term (divergence)\n")
    text.append("agree: Kendall's tau of the student's and the teacher's order of the candidates")
    return text


def _token_table(tokens: Sequence[InspectedToken], *, compared: bool) -> Table:
    table = Table(box=SIMPLE, padding=0, pad_edge=False)
    table.add_column("", justify="right")
    table.add_column("")
    table.add_column("token", overflow="fold", max_width=14)
    for name in ("student", "teacher", "agree", "gate"):
        table.add_column(name, justify="right")
    table.add_column(Text("candidates [teacher's rank]"), ratio=1)
    for token in tokens:
        marks = "o" * token.in_opener + "e" * token.in_entropy_term
        text = Text(show_whitespace(token.text), COLOURS[token.before.level])
        table.add_row(str(token.position), marks, text, *_score_cells(token.before, f"{token.gate:.2f}"))
        if compared and token.after:
            table.add_row("", "", Text("after", "dim"), *_score_cells(token.after, ""))
    return table


def _score_cells(scores: TokenScores, gate: str) -> list[str | Text]:
    candidates = Text()
    for candidate in scores.candidates:
        candidates.append(show_whitespace(candidate.text))
        candidates.append(f"[{candidate.rank}] ", "cyan")
    numbers = (scores.student_entropy, scores.teacher_entropy, scores.agreement)
    return [*(f"{number:.2f}" for number in numbers), gate, candidates]


def _show_entropy_by_position(aggregate: Aggregate) -> None:
    student, teacher = aggregate.mean_entropy_by_position
    last = len(student) - 1
    indices = sorted({round(i * last / (POSITION_ROWS - 1)) for i in range(POSITION_ROWS)})
    show_table(
        "mean entropy by position (nats)",
        ["position", "student", "teacher", "turns" if aggregate.turns > aggregate.responses else "responses"],
        [
            [str(i + 1), f"{student[i]:.3f}", f"{teacher[i]:.3f}", f"{aggregate.responses_by_position[i]:,}"]
            for i in indices
        ],
    )


def _show_opener_lengths(aggregate: Aggregate) -> None:
    lengths, counts = zip(*aggregate.opener_length_bins, strict=True)
    width = lengths[1] - lengths[0] if len(lengths) > 1 else 1
    names = [str(shortest) if width == 1 else f"{shortest}-{shortest + width - 1}" for shortest in lengths]
    _show_bars("opener lengths (tokens)", "openers", names, counts)


def _show_histogram(title: str, histogram: Histogram) -> None:
    half = (histogram.high - histogram.low) / len(histogram.counts) / 2
    ranges = [f"{centre - half:.2f} to {centre + half:.2f}" for centre in histogram.bin_centres]
    _show_bars(title, "tokens", ranges, histogram.counts.tolist())


def _show_bars(title: str, unit: str, names: Sequence[str], counts: Sequence[int]) -> None:
    largest = max(counts)
    rows = [
        [name, f"{count:,}", "█" * round(BAR_LENGTH * count / largest)]
        for name, count in zip(names, counts, strict=True)
    ]
    show_table(title, ["", unit, ""], rows)
