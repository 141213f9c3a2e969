"""The layout and the charts, in a real browser: offline, escaped, readable in light, dark and on a phone."""

import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.browser import browser, opened
from tsdkd.stages.pages.charts import MOST_VALUES, Series, bars, dots, lines
from tsdkd.stages.pages.page import templates

NASTY = "<script>document.title = 'run'</script><b>bold</b> & \"quotes\""
PAGE = """
{% extends 'base.html' %}
{% import 'parts.html' as parts %}
{% block title %}a page{% endblock %}
{% block content %}
<h1>{{ text }}</h1>
{{ parts.table(['a', 'b'], [[text, 'wide' * 40]]) }}
{{ parts.pairs([('name', text)]) }}
{% for one in charts %}{{ parts.chart(one) }}{% endfor %}
{% endblock %}
"""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as one:
        yield one


@pytest.fixture
def page(tmp_path: Path) -> Path:
    curve = Series("loss", [1, 2, 3], [3.0, 2.0, 1.5], [2.5, 1.5, 1.0], [3.5, 2.5, 2.0])
    charts = [
        lines("loss", "step", "nats", [curve]),
        bars("gate", "weight", "tokens", [Series("gate", [0.0, 0.5], [7, 9])]),
    ]
    file = tmp_path / "page.html"
    file.write_text(templates().from_string(PAGE).render(text=NASTY, charts=charts))
    return file


@pytest.mark.parametrize("width", [390, 1200])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_shows_as_text_and_fits(chromium: Any, page: Path, width: int, scheme: str) -> None:
    with opened(chromium, page, viewport={"width": width, "height": 800}, color_scheme=scheme) as tab:
        assert tab.title() == "a page"
        assert [tab.inner_text(place) for place in ("h1", "tbody th", "dd")] == [NASTY] * 3
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        ink = tab.evaluate("getComputedStyle(document.querySelector('figure svg text')).fill")
        assert ink == tab.evaluate("getComputedStyle(document.body).color")


def test_a_charts_values_can_be_read_without_seeing_it(chromium: Any, page: Path) -> None:
    with opened(chromium, page) as tab:
        tab.click("figure >> nth=0 >> summary")
        assert tab.inner_text("figure >> nth=0 >> tbody").split() == ["1", "3", "2", "2", "3", "1.5"]


def test_a_table_of_many_values_keeps_both_ends() -> None:
    steps = list(range(100))
    rows = lines("t", "step", "y", [Series("a", steps, steps), Series("b", [99], [7])]).rows
    assert len(rows) == MOST_VALUES
    assert rows[0] == ["0", "0", ""]
    assert rows[-1] == ["99", "99", "7"]


def test_names_are_drawn_as_they_are() -> None:
    """No mathematics, nothing hidden, and letters that the fonts here lack without a warning."""
    names = ["a$\\frac$", "a$b$c", "_a", "运行"]
    series = [Series(name, [0, 1], [1.0, 2.0]) for name in names]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        svgs = [lines("t", "x", "y", series).svg, bars("t", "x", "y", series).svg, dots("t", "x", names, series).svg]
    for svg in svgs:
        texts = re.findall(r"<text[^>]*>([^<]*)</text>", svg)
        assert set(names) <= set(texts)


def test_the_same_values_draw_the_same_bytes_and_two_charts_share_no_ids() -> None:
    one = [Series("a", [1, 2], [3, 4], [2, 3], [4, 5])]
    first, again, other = (lines(title, "x", "y", one).svg for title in ("t", "t", "u"))
    assert first == again
    ids = [{part.split('"')[0] for part in svg.split('clipPath id="')[1:]} for svg in (first, other)]
    assert ids[0]
    assert not ids[0] & ids[1]
