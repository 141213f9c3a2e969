"""Charts as inline SVG that takes its text colour from the page, each with its values as a table beside it."""

import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isnan, nan
from typing import Any

import markupsafe

INK = "#010203"
"""Drawn as the page's own text colour, so that charts follow light and dark."""
COLOURS = ("#2f7ed8", "#d9730d", "#2e9e5b", "#b04ad8", "#c83c3c", "#8a8a2a")
"""Of series, in order; each has contrast 3 or more on white and on near-black."""
STROKES = ("-", "--", ":", "-.")
"""Of lines whose colours come again."""
MARKS = ("o", "s", "^", "D", "v", "P")
"""Of dots, so that they can be told apart without colours."""
MOST_VALUES = 12
"""Rows of a chart's table of values, evenly spread."""
WIDTH = 5.2
"""Inches, at 10 points a letter: what a phone still shows readably."""


@dataclass(frozen=True, slots=True)
class Series:
    """One line, set of bars or set of dots."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    """With `high`: a band, or error bars; nan where it is not known."""
    high: Sequence[float] | None = None


@dataclass(frozen=True, slots=True)
class Chart:
    """What a template shows: `chart.svg` beside `chart.columns` and `chart.rows`, its text alternative."""

    title: str
    svg: markupsafe.Markup
    columns: list[str]
    rows: list[list[str]]
    said: str = ""
    """The same in a sentence."""


def lines(title: str, x: str, y: str, series: Sequence[Series], said: str = "") -> Chart:
    """Curves over a common axis."""

    def draw(axes: Any) -> list[Any]:
        handles: list[Any] = []
        for number, one in enumerate(series):
            colour, stroke = COLOURS[number % len(COLOURS)], STROKES[number // len(COLOURS) % len(STROKES)]
            mark = "." if len(one.x) < 3 else ""
            handles += axes.plot(one.x, one.y, color=colour, linestyle=stroke, linewidth=1.8, marker=mark)
            if one.low is not None and one.high is not None:
                axes.fill_between(one.x, one.low, one.high, color=colour, alpha=0.2, linewidth=0)
        axes.set(xlabel=x, ylabel=y)
        axes.grid(axis="y", color=INK, alpha=0.12)
        return handles

    return Chart(title, _svg(title, draw, series), [x, *(one.name for one in series)], _values(series), said)


def bars(title: str, x: str, y: str, series: Sequence[Series], said: str = "") -> Chart:
    """Counts or shares over bins; series share their x."""

    def draw(axes: Any) -> list[Any]:
        handles: list[Any] = []
        for number, one in enumerate(series):
            width = (one.x[1] - one.x[0] if len(one.x) > 1 else 1) / len(series)
            colour = COLOURS[number % len(COLOURS)]
            handles.append(axes.bar([at + number * width for at in one.x], one.y, width * 0.9, color=colour))
        axes.set(xlabel=x, ylabel=y)
        axes.grid(axis="y", color=INK, alpha=0.12)
        return handles

    return Chart(title, _svg(title, draw, series), [x, *(one.name for one in series)], _values(series), said)


def dots(title: str, x: str, labels: Sequence[str], series: Sequence[Series], *, zero: bool = False) -> Chart:
    """A row for each label, with each series' value and its interval; a series' `x` are the numbers of its rows.

    `zero`: a line there, for differences.
    """

    def draw(axes: Any) -> list[Any]:
        handles: list[Any] = []
        for number, one in enumerate(series):
            at = [row + 0.7 * ((number + 0.5) / len(series) - 0.5) for row in one.x]
            low, high = one.low or one.y, one.high or one.y
            spread = [
                [y - edge for y, edge in zip(one.y, low, strict=True)],
                [edge - y for y, edge in zip(one.y, high, strict=True)],
            ]
            style = {"color": COLOURS[number % len(COLOURS)], "marker": MARKS[number % len(MARKS)], "linestyle": ""}
            handles.append(axes.errorbar(one.y, at, xerr=spread, capsize=3, **style))
        axes.set(xlabel=x, yticks=range(len(labels)), yticklabels=labels)
        axes.set_ylim(len(labels) - 0.5, -0.5)
        if zero:
            axes.axvline(0, color=INK, linewidth=1)
        axes.grid(axis="x", color=INK, alpha=0.12)
        return handles

    rows = [[label, *(_interval(one, row) for one in series)] for row, label in enumerate(labels)]
    height = 1.2 + 0.18 * len(labels) * (len(series) + 1)
    return Chart(title, _svg(title, draw, series, height), ["", *(one.name for one in series)], rows)


def _interval(series: Series, row: int) -> str:
    if row not in series.x:
        return ""
    i = list(series.x).index(row)
    low, high = (edge[i] if edge else nan for edge in (series.low, series.high))
    return f"{series.y[i]:.4g}" + ("" if isnan(low) or isnan(high) else f" ({low:.4g} to {high:.4g})")


def _svg(
    title: str, draw: Callable[[Any], list[Any]], series: Sequence[Series], height: float = 2.7
) -> markupsafe.Markup:
    """`draw` returns what the legend of more than one series shows; `height` in inches, without it."""
    with _figure(title) as figure:
        figure.set_size_inches(WIDTH, height + (0.22 * ((len(series) + 1) // 2) if len(series) > 1 else 0))
        axes = figure.subplots()
        handles = draw(axes)
        axes.spines[["top", "right"]].set_visible(False)
        if len(series) > 1:
            figure.legend(handles, [one.name for one in series], loc="outside lower left", ncols=2, frameon=False)
        target = io.StringIO()
        figure.savefig(target, format="svg", transparent=True, metadata={"Date": None})
    svg = target.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor").replace("<svg ", '<svg aria-hidden="true" ', 1)
    return markupsafe.Markup(svg)


@contextmanager
def _figure(title: str) -> Iterator[Any]:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": title,  # ids differ from chart to chart, and not from run to run
        "font.family": "sans-serif",
        "font.size": 10,
        "text.parse_math": False,
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    }
    with mpl.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the browser draws the text, in fonts of its own
        yield Figure(layout="constrained")


def _values(series: Sequence[Series]) -> list[list[str]]:
    points = sorted({at for one in series for at in one.x})
    if len(points) > MOST_VALUES:
        points = [points[round(i * (len(points) - 1) / (MOST_VALUES - 1))] for i in range(MOST_VALUES)]
    known = [dict(zip(one.x, one.y, strict=True)) for one in series]
    return [[f"{at:g}", *(f"{values[at]:.4g}" if at in values else "" for values in known)] for at in points]
