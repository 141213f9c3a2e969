"""Charts as inline SVG in the page's text colour, each with its values for a table."""

import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isnan, nan
from typing import Any

import markupsafe

from tsdkd.printable import escape_controls

INK = "#010203"
"""Replaced by the page's text colour, so that charts follow light and dark."""
HIDDEN = 'aria-hidden="true"'
"""Of a drawing in a page: screen readers read the table of values."""
COLOURS = ("#2f7ed8", "#d9730d", "#2e9e5b", "#b04ad8", "#c83c3c", "#8a8a2a")
"""Of series, in order; each has contrast 3 or more on white and on near-black."""
STROKES = ("-", "--", ":", "-.")
"""Line styles; the next one starts when the colours repeat."""
MARKERS = ("o", "s", "^", "D", "v", "P")
"""Of dots, which must differ without colours."""
MAX_VALUES = 12
"""Rows in a chart's table of values, evenly spread."""
Z_95 = 1.96
"""Standard errors on each side of a 95 % interval."""
WIDTH = 5.2
"""Inches; at a font size of 10 points, a phone shows such a chart legibly."""


@dataclass(frozen=True, slots=True)
class Series:
    """One line, one set of bars or one set of dots."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    """With `high`: a band or error bars; nan where unknown."""
    high: Sequence[float] | None = None


@dataclass(frozen=True, slots=True)
class Chart:
    """A drawn chart with its text alternatives."""

    title: str
    svg: markupsafe.Markup
    columns: list[str]
    """Of the table of values."""
    rows: list[list[str]]
    description: str = ""
    """The chart in a sentence."""

    @property
    def svg_file(self) -> str:
        """The drawing as a file of its own, on white; without a page around it, its text is black."""
        return str(self.svg).replace(HIDDEN, 'style="background: white"', 1)


def line_chart(title: str, x: str, y: str, series: Sequence[Series], description: str = "") -> Chart:
    """Lines over a common axis."""

    def draw(axes: Any) -> list[Any]:
        handles: list[Any] = []
        for number, line in enumerate(series):
            colour, stroke = COLOURS[number % len(COLOURS)], STROKES[number // len(COLOURS) % len(STROKES)]
            marker = "." if len(line.x) < 3 else ""
            handles += axes.plot(line.x, line.y, color=colour, linestyle=stroke, linewidth=1.8, marker=marker)
            if line.low is not None and line.high is not None:
                axes.fill_between(line.x, line.low, line.high, color=colour, alpha=0.2, linewidth=0)
        axes.set(xlabel=x, ylabel=y)
        axes.grid(axis="y", color=INK, alpha=0.12)
        return handles

    columns = [x, *(line.name for line in series)]
    return Chart(title, _draw_svg(title, draw, series), columns, _value_rows(series), description)


def bar_chart(title: str, x: str, y: str, series: Sequence[Series]) -> Chart:
    """Counts over bins; all series have the same x."""

    def draw(axes: Any) -> list[Any]:
        handles: list[Any] = []
        for number, bars in enumerate(series):
            width = (bars.x[1] - bars.x[0] if len(bars.x) > 1 else 1) / len(series)
            colour = COLOURS[number % len(COLOURS)]
            handles.append(axes.bar([x + number * width for x in bars.x], bars.y, width * 0.9, color=colour))
        axes.set(xlabel=x, ylabel=y)
        axes.grid(axis="y", color=INK, alpha=0.12)
        return handles

    columns = [x, *(bars.name for bars in series)]
    return Chart(title, _draw_svg(title, draw, series), columns, _value_rows(series))


def dot_chart(title: str, x: str, labels: Sequence[str], series: Sequence[Series], *, zero_line: bool = False) -> Chart:
    """A row for each label with a value and an interval of each series; a series' `x` are row numbers."""

    def draw(axes: Any) -> list[Any]:
        handles: list[Any] = []
        for number, dots in enumerate(series):
            heights = [row + 0.7 * ((number + 0.5) / len(series) - 0.5) for row in dots.x]
            low, high = dots.low or dots.y, dots.high or dots.y
            errors = [
                [y - edge for y, edge in zip(dots.y, low, strict=True)],
                [edge - y for y, edge in zip(dots.y, high, strict=True)],
            ]
            style = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)], "linestyle": ""}
            handles.append(axes.errorbar(dots.y, heights, xerr=errors, capsize=3, **style))
        axes.set(xlabel=x, yticks=range(len(labels)), yticklabels=labels)
        axes.set_ylim(len(labels) - 0.5, -0.5)
        if zero_line:
            axes.axvline(0, color=INK, linewidth=1)
        axes.grid(axis="x", color=INK, alpha=0.12)
        return handles

    rows = [[label, *(_format_interval(dots, row) for dots in series)] for row, label in enumerate(labels)]
    height = 1.2 + 0.18 * len(labels) * (len(series) + 1)
    return Chart(title, _draw_svg(title, draw, series, height), ["", *(dots.name for dots in series)], rows)


def _format_interval(series: Series, row: int) -> str:
    if row not in series.x:
        return ""
    i = list(series.x).index(row)
    low, high = (edge[i] if edge else nan for edge in (series.low, series.high))
    return f"{series.y[i]:.4g}" + ("" if isnan(low) or isnan(high) else f" ({low:.4g} to {high:.4g})")


def _draw_svg(
    title: str, draw: Callable[[Any], list[Any]], series: Sequence[Series], height: float = 2.7
) -> markupsafe.Markup:
    """`draw` returns the handles of the legend, which several series have; `height` in inches, without the legend."""
    with _figure(title) as figure:
        figure.set_size_inches(WIDTH, height + (0.22 * ((len(series) + 1) // 2) if len(series) > 1 else 0))
        axes = figure.subplots()
        handles = draw(axes)
        axes.spines[["top", "right"]].set_visible(False)
        if len(series) > 1:
            names = [curve.name for curve in series]
            figure.legend(handles, names, loc="outside lower left", ncols=2, frameon=False)
        target = io.StringIO()
        figure.savefig(target, format="svg", transparent=True, metadata={"Date": None})
    svg = escape_controls(target.getvalue())
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor").replace("<svg ", f"<svg {HIDDEN} ", 1)
    return markupsafe.Markup(svg)


@contextmanager
def _figure(title: str) -> Iterator[Any]:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": title,  # makes ids differ between charts and equal between runs
        "font.family": "sans-serif",
        "font.size": 10,
        "text.parse_math": False,
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    }
    with mpl.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the browser draws the text with its own fonts
        yield Figure(layout="constrained")


def _value_rows(series: Sequence[Series]) -> list[list[str]]:
    xs = sorted({x for curve in series for x in curve.x})
    if len(xs) > MAX_VALUES:
        xs = [xs[round(i * (len(xs) - 1) / (MAX_VALUES - 1))] for i in range(MAX_VALUES)]
    values = [dict(zip(curve.x, curve.y, strict=True)) for curve in series]
    return [[f"{x:g}", *(f"{ys[x]:.4g}" if x in ys else "" for ys in values)] for x in xs]
