"""How `tsdkd inspect` shows what it found in a terminal: coloured text, tables, and a pager where somebody looks."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from tsdkd.cli.console import out, show_pairs, show_table
from tsdkd.stages.inspect.aggregate import Aggregate, Distribution
from tsdkd.stages.inspect.response import LEVELS, PositionView, Response, Token
from tsdkd.stages.inspect.token_texts import show_whitespace

COLOURS = ("", "black on #fff2b3", "black on #ffd97a", "black on #ffb65c", "black on #ff8f5e", "black on #ff6b6b")
"""Of entropies, from below the first of `LEVELS` to above the last; readable on light and dark terminals."""
OPENER_END = "┃"
BAR = 24
"""Characters of the longest bar."""
ROWS = 12
"""Of a table of positions, evenly spread."""


def show_response(response: Response, positions: range | None = None) -> None:
    """The prompt, the response in colours, and a table of its tokens (only of some `positions`)."""
    with _paged():
        show_pairs("response", response.facts)
        for role, content in response.messages:
            out.print(Text.assemble((f"{role}: ", "dim"), content))
        out.print()
        out.print(_coloured(response))
        out.print()
        out.print(_legend())
        wanted = [token for token in response.tokens if positions is None or token.position in positions]
        out.print(_table(wanted, compared=response.after is not None))


def show_aggregate(found: Aggregate) -> None:
    """Facts, entropies by position and distributions."""
    with _paged():
        show_pairs("selection", found.facts)
        student, teacher = found.by_position
        last = len(student) - 1
        places = sorted({round(i * last / (ROWS - 1)) for i in range(ROWS)})
        show_table(
            "mean entropy by position (nats)",
            ["position", "student", "teacher", "responses"],
            [[str(i + 1), f"{student[i]:.3f}", f"{teacher[i]:.3f}", f"{found.reached[i]:,}"] for i in places],
        )
        lengths = found.lengths
        width = lengths[1][0] - lengths[0][0] if len(lengths) > 1 else 1
        names = [str(first) if width == 1 else f"{first}-{first + width - 1}" for first, _ in lengths]
        if found.objective.alpha:
            _show_bars("opener lengths (tokens)", "openers", names, [count for _, count in lengths])
        for title, one, there in (
            ("gate weights", found.gates, found.gated),
            ("Kendall's tau of both rankings", found.agreement, True),
            ("captured mass", found.mass, found.mass.counts.any()),
        ):
            if there:
                _show_bars(title, "tokens", _ranges(one), one.counts.tolist())


@contextmanager
def _paged() -> Iterator[None]:
    """Through a pager on a terminal; colours pass through less, which stays away where one screen is enough."""
    if not (out.is_terminal and sys.stdin.isatty()):
        yield
        return
    os.environ.setdefault("LESS", "-FRX")
    with out.pager(styles=True):
        yield


def _coloured(response: Response) -> Text:
    text = Text()
    for token in response.tokens:
        style = f"{COLOURS[token.before.level]} bold underline" if token.uncertain else COLOURS[token.before.level]
        text.append(token.text.replace("\n", "↵\n"), style)
        if token.position == response.opener:
            text.append(OPENER_END, "bold cyan")
    return text


def _legend() -> Text:
    text = Text("student's entropy, nats: ")
    for style, low, high in zip(COLOURS, (0.0, *LEVELS), (*LEVELS, None), strict=True):
        text.append(f" {low:g}{'+' if high is None else f'-{high:g}'} ", style)
    text.append(f"\n{OPENER_END} the opener ends here; o in the table: in the opener\n")
    text.append("underlined", "bold underline")
    text.append(", e in the table: entropy is minimised\nagree: Kendall's tau of both orders of the candidates")
    return text


def _table(tokens: Sequence[Token], *, compared: bool) -> Table:
    table = Table(box=SIMPLE, padding=0, pad_edge=False)
    table.add_column("", justify="right")
    table.add_column("")
    table.add_column("token", overflow="fold", max_width=14)
    for name in ("student", "teacher", "agree", "gate"):
        table.add_column(name, justify="right")
    table.add_column(Text("student's candidates [teacher's rank]"), ratio=1)
    for token in tokens:
        marks = "o" * token.opener + "e" * token.uncertain
        shown = Text(show_whitespace(token.text), COLOURS[token.before.level])
        table.add_row(str(token.position), marks, shown, *_seen(token.before, f"{token.gate:.2f}"))
        if compared and token.after:
            table.add_row("", "", Text("after", "dim"), *_seen(token.after, ""))
    return table


def _seen(seen: PositionView, gate: str) -> list[str | Text]:
    candidates = Text()
    for candidate in seen.candidates:
        candidates.append(show_whitespace(candidate.text))
        candidates.append(f"[{candidate.rank}] ", "cyan")
    return [f"{seen.student_entropy:.2f}", f"{seen.teacher_entropy:.2f}", f"{seen.agreement:.2f}", gate, candidates]


def _ranges(one: Distribution) -> list[str]:
    half = (one.high - one.low) / len(one.counts) / 2
    return [f"{centre - half:.2f} to {centre + half:.2f}" for centre in one.centres]


def _show_bars(title: str, unit: str, names: Sequence[str], counts: Sequence[int]) -> None:
    most = max(counts)
    rows = [[name, f"{count:,}", "█" * round(BAR * count / most)] for name, count in zip(names, counts, strict=True)]
    show_table(title, ["", unit, ""], rows)
