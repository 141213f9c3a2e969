"""Charts as inline SVG that takes its text colour from the page, each with its values as a table beside it."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import markupsafe

INK = "#010203"
"""Drawn as the page's own text colour, so that charts follow light and dark."""
COLOURS = ("#2f7ed8", "#d9730d", "#2e9e5b", "#b04ad8", "#c83c3c", "#8a8a2a")
"""Of series, in order; each has contrast 3 or more on white and on near-black."""
MOST_VALUES = 12
"""Rows of a chart's table of values, evenly spread."""


@dataclass(frozen=True, slots=True)
class Series:
    """One line or set of bars."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    """With `high`: a band, or error bars."""
    high: Sequence[float] | None = None


@dataclass(frozen=True, slots=True)
class Chart:
    """What a template shows: `chart.svg` beside `chart.columns` and `chart.rows`, its text alternative."""

    title: str
    svg: markupsafe.Markup
    columns: list[str]
    rows: list[list[str]]


def lines(title: str, x: str, y: str, series: Sequence[Series]) -> Chart:
    """Curves over a common axis."""
    return _draw("line", title, x, y, series)


def bars(title: str, x: str, y: str, series: Sequence[Series]) -> Chart:
    """Counts or shares over bins; series share their x."""
    return _draw("bar", title, x, y, series)


def _draw(kind: str, title: str, x: str, y: str, series: Sequence[Series]) -> Chart:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": title,  # ids differ from chart to chart, and not from run to run
        "font.family": "sans-serif",
        "font.size": 10,
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=(6.4, 3.0), layout="constrained")
        axes = figure.subplots()
        for number, one in enumerate(series):
            colour = COLOURS[number % len(COLOURS)]
            if kind == "bar":
                width = (one.x[1] - one.x[0] if len(one.x) > 1 else 1) / len(series)
                axes.bar([at + number * width for at in one.x], one.y, width * 0.9, color=colour, label=one.name)
            else:
                axes.plot(
                    one.x, one.y, color=colour, label=one.name, linewidth=1.8, marker="." if len(one.x) < 3 else ""
                )
            if one.low is not None and one.high is not None:
                axes.fill_between(one.x, one.low, one.high, color=colour, alpha=0.2, linewidth=0)
        axes.set(xlabel=x, ylabel=y)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color=INK, alpha=0.12)
        if len(series) > 1:
            axes.legend(frameon=False)
        target = io.StringIO()
        figure.savefig(target, format="svg", transparent=True, metadata={"Date": None})
    svg = target.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor").replace("<svg ", '<svg aria-hidden="true" ', 1)
    return Chart(title, markupsafe.Markup(svg), [x, *(one.name for one in series)], _values(series))


def _values(series: Sequence[Series]) -> list[list[str]]:
    points = sorted({at for one in series for at in one.x})
    if len(points) > MOST_VALUES:
        points = [points[round(i * (len(points) - 1) / (MOST_VALUES - 1))] for i in range(MOST_VALUES)]
    known = [dict(zip(one.x, one.y, strict=True)) for one in series]
    return [[f"{at:g}", *(f"{values[at]:.4g}" if at in values else "" for values in known)] for at in points]
