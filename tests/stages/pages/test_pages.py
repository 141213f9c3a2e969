"""Layout and charts in a browser: offline, escaped, legible in light and dark and on a phone."""

import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from tests.helpers.browser import open_browser, open_page
from tsdkd.stages.pages.charts import MAX_VALUES, Series, bar_chart, dot_chart, line_chart
from tsdkd.stages.pages.page import load_templates

MARKUP = "<script>document.title = 'run'</script><b>bold</b> & \"quotes\""
PAGE = """
{% extends 'base.html' %}
{% import 'parts.html' as parts %}
{% block title %}a page{% endblock %}
{% block content %}
<h1>{{ text }}</h1>
{{ parts.table(['a', 'b'], [[text, 'wide' * 40]]) }}
{{ parts.pairs([('name', text)]) }}
{% for chart in charts %}{{ parts.chart(chart) }}{% endfor %}
{% endblock %}
"""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with open_browser() as chromium:
        yield chromium


@pytest.fixture
def page(tmp_path: Path) -> Path:
    curve = Series("loss", [1, 2, 3], [3.0, 2.0, 1.5], [2.5, 1.5, 1.0], [3.5, 2.5, 2.0])
    charts = [
        line_chart("loss", "step", "nats", [curve]),
        bar_chart("gate", "weight", "tokens", [Series("gate", [0.0, 0.5], [7, 9])]),
    ]
    file = tmp_path / "page.html"
    file.write_text(load_templates().from_string(PAGE).render(text=MARKUP, charts=charts))
    return file


@pytest.mark.parametrize("width", [390, 1200])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_markup_stays_text_and_the_page_fits(chromium: Any, page: Path, width: int, scheme: str) -> None:
    with open_page(chromium, page, viewport={"width": width, "height": 800}, color_scheme=scheme) as tab:
        assert tab.title() == "a page"
        assert [tab.inner_text(selector) for selector in ("h1", "tbody th", "dd")] == [MARKUP] * 3
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        ink = tab.evaluate("getComputedStyle(document.querySelector('figure svg text')).fill")
        assert ink == tab.evaluate("getComputedStyle(document.body).color")


def test_a_chart_has_its_values_as_a_table(chromium: Any, page: Path) -> None:
    with open_page(chromium, page) as tab:
        tab.click("figure >> nth=0 >> summary")
        assert tab.inner_text("figure >> nth=0 >> tbody").split() == ["1", "3", "2", "2", "3", "1.5"]


def test_a_long_table_of_values_keeps_both_ends() -> None:
    steps = list(range(100))
    rows = line_chart("t", "step", "y", [Series("a", steps, steps), Series("b", [99], [7])]).rows
    assert len(rows) == MAX_VALUES
    assert rows[0] == ["0", "0", ""]
    assert rows[-1] == ["99", "99", "7"]


def test_names_are_drawn_literally() -> None:
    """No mathematics, no hidden names, and no warning about letters that matplotlib's fonts lack."""
    names = ["a$\\frac$", "a$b$c", "_a", "运行"]
    series = [Series(name, [0, 1], [1.0, 2.0]) for name in names]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        charts = [
            line_chart("t", "x", "y", series),
            bar_chart("t", "x", "y", series),
            dot_chart("t", "x", names, series),
        ]
    for chart in charts:
        texts = re.findall(r"<text[^>]*>([^<]*)</text>", chart.svg)
        assert set(names) <= set(texts)


def test_a_drawing_is_an_svg_file() -> None:
    root = ElementTree.fromstring(line_chart("t", "x", "y", [Series("a", [1, 2], [3, 4])]).svg_file)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert root.get("style") == "background: white"
    assert root.get("aria-hidden") is None


def test_charts_are_reproducible_and_share_no_ids() -> None:
    series = [Series("a", [1, 2], [3, 4], [2, 3], [4, 5])]
    first, again, other = (line_chart(title, "x", "y", series).svg for title in ("t", "t", "u"))
    assert first == again
    ids = [{part.split('"')[0] for part in svg.split('clipPath id="')[1:]} for svg in (first, other)]
    assert ids[0]
    assert not ids[0] & ids[1]
