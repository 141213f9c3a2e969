"""The pages in a real browser: the artifact's numbers, opened by mouse, finger and keyboard; rollouts stay text."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.browser import browser, opened
from tsdkd.artifacts.reader import read_artifact
from tsdkd.core import TSDKDConfig
from tsdkd.stages.config.inspect import InspectConfig
from tsdkd.stages.inspect import page
from tsdkd.stages.inspect.response import LEVELS, Candidate, PositionView, Response, Token
from tsdkd.stages.inspect.stage import inspect_all, inspect_scores

NASTY = "</script><script>document.title = 'run'</script><img src=x onerror=\"document.title = 'run'\">"
PHONE: dict[str, Any] = {"viewport": {"width": 390, "height": 844}, "has_touch": True}
CONTRAST = """
([element, behind]) => {
  const channels = (name, of) => getComputedStyle(of)[name].match(/[\\d.]+/g).map(Number);
  const light = (rgb) => rgb.slice(0, 3).map((c) => c / 255)
    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const back = channels("backgroundColor", element);
  const pair = [channels("color", element), back[3] === 0 ? channels("backgroundColor", behind) : back].map(light);
  return (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
}
"""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as one:
        yield one


def seen(entropy: float, ranks: list[int], texts: tuple[str, str] = ("a", "b")) -> PositionView:
    return PositionView(entropy, 1.0, 1.0, [Candidate(text, rank) for text, rank in zip(texts, ranks, strict=True)])


def written(tmp_path: Path, content: str) -> Path:
    (tmp_path / "page.html").write_text(content, encoding="utf-8")
    return tmp_path / "page.html"


@pytest.fixture
def nasty() -> Response:
    """Tokens of every colour, of which the fourth is much too long; markup wherever a rollout may put some."""
    texts = [NASTY, " two", "\n", "x" * 300, " five", " six"]
    entropies = [0.0, *LEVELS]
    tokens = [
        Token(i + 1, text, 0.25, i < 2, i == 5, seen(entropy, [2, 1], (NASTY, " b")), seen(5 - entropy, [1, 2]))
        for i, (text, entropy) in enumerate(zip(texts, entropies, strict=True))
    ]
    return Response(NASTY, "stop", NASTY, [("user", NASTY)], TSDKDConfig(k=2), 0.1, 2, tokens, NASTY)


def test_the_numbers_are_the_artifacts(chromium: Any, run: Path, tmp_path: Path) -> None:
    row = read_artifact(run / "scores", "scores").table().to_pylist()[2]
    found = inspect_scores(run / "scores", InspectConfig(sample_id=row["sample_id"]))
    with opened(chromium, written(tmp_path, page.response_page(found))) as tab:
        cells = tab.evaluate(
            "[...document.querySelectorAll('#positions tbody tr')].map(r => [...r.cells].map(c => c.innerText))"
        )
        ranks = tab.evaluate("[...document.querySelectorAll('#positions b')].map(b => Number(b.textContent) - 1)")
    assert [float(line[3]) for line in cells] == pytest.approx(row["student_entropy"], abs=6e-4)
    assert [float(line[4]) for line in cells] == pytest.approx(row["teacher_entropy"], abs=6e-4)
    gaps = np.array(row["student_entropy"]) - np.array(row["teacher_entropy"])
    assert [float(line[5]) for line in cells] == pytest.approx(1 / (1 + np.exp(-gaps)), abs=6e-4)
    assert ranks == row["ranks"]
    assert ["opener" in line[2] for line in cells] == [token.opener for token in found.tokens]
    assert ["entropy" in line[2] for line in cells] == [token.uncertain for token in found.tokens]


def test_a_click_opens_what_both_models_see(chromium: Any, run: Path, tmp_path: Path) -> None:
    found = inspect_scores(run / "scores", InspectConfig())
    expected = [f"{one.text} {one.rank}" for one in found.tokens[3].before.candidates]
    with opened(chromium, written(tmp_path, page.response_page(found))) as tab:
        assert tab.is_hidden("#panel")
        tab.click("#tokens a >> nth=3")
        assert tab.eval_on_selector_all("#panel li", "items => items.map(one => one.innerText)") == expected
        assert f"{found.tokens[3].before.student_entropy:.3f}" in tab.inner_text("#panel")
        assert tab.evaluate("location.hash") == ""  # the page stays where it is
        tab.hover("#tokens a >> nth=5")
        assert tab.inner_text("#panel dd") == "6"
        tab.hover("h1")
        assert tab.inner_text("#panel dd") == "4"


def test_the_keyboard_opens_it_and_a_finger_does(chromium: Any, nasty: Response, tmp_path: Path) -> None:
    file = written(tmp_path, page.response_page(nasty))
    with opened(chromium, file) as tab:
        tab.focus("#tokens a")
        tab.keyboard.press("ArrowRight")
        assert tab.inner_text("#panel dd") == "2"
        tab.keyboard.press("ArrowLeft")
        tab.keyboard.press("ArrowLeft")  # there is none before the first
        assert tab.inner_text("#panel dd") == "1"
        tab.keyboard.press("Tab")
        assert tab.inner_text("#panel dd") == "2"
    with opened(chromium, file, **PHONE) as tab:
        tab.tap("#tokens a >> nth=4")
        assert tab.inner_text("#panel dd") == "5"
        box = tab.query_selector("#panel").bounding_box()
        assert box["y"] + box["height"] <= PHONE["viewport"]["height"]


def test_without_scripts_a_token_leads_to_its_row(chromium: Any, nasty: Response, tmp_path: Path) -> None:
    with opened(chromium, written(tmp_path, page.response_page(nasty)), java_script_enabled=False) as tab:
        tab.click("#tokens a >> nth=1")
        assert tab.url.endswith("#t2")
        assert "student 0.50, teacher 1.00 nats, gate 0.25" in tab.get_attribute("#tokens a >> nth=1", "title")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("more", [PHONE, {"viewport": {"width": 1200, "height": 900}}], ids=["phone", "desk"])
def test_markup_shows_as_text_and_everything_can_be_read(
    chromium: Any, nasty: Response, tmp_path: Path, scheme: str, more: dict[str, Any]
) -> None:
    with opened(chromium, written(tmp_path, page.response_page(nasty)), color_scheme=scheme, **more) as tab:
        tab.click("#tokens a >> nth=0")
        assert tab.title() == f"Response {NASTY}, token by token"
        assert tab.inner_text("pre") == NASTY
        assert tab.inner_text("#tokens a >> nth=0") == NASTY
        assert tab.inner_text("#panel li >> nth=0").startswith(NASTY.replace(" ", "\u2423"))
        assert tab.locator("img").count() == 0
        assert tab.locator("script").count() == 1
        assert tab.evaluate("document.documentElement.scrollWidth") <= more["viewport"]["width"]
        body = tab.query_selector("body")
        for token in tab.query_selector_all("#tokens a"):
            assert tab.evaluate(CONTRAST, [token, body]) >= 4.5


def test_marks_and_colours(chromium: Any, nasty: Response, tmp_path: Path) -> None:
    """Six colours; the opener ends behind the second token; after training the colours are the other way round."""
    with opened(chromium, written(tmp_path, page.response_page(nasty))) as tab:

        def colours() -> list[str]:
            return list(
                tab.eval_on_selector_all("#tokens a", "all => all.map(a => getComputedStyle(a).backgroundColor)")
            )

        before = colours()
        assert len(set(before)) == 6
        marks = tab.evaluate("[...document.querySelectorAll('#tokens > *')].map(one => one.className.split(' ')[0])")
        assert marks == ["token", "token", "end", "token", "token", "token", "token"]
        boxed = tab.eval_on_selector_all("#tokens a", "all => all.map(a => getComputedStyle(a).boxShadow !== 'none')")
        assert boxed == [False] * 5 + [True]
        tab.check("#after")
        levels = [sum(5 - bound >= level for level in LEVELS) for bound in (0.0, *LEVELS)]
        assert colours() == [before[level] for level in levels]
        assert "0.500 \u2192 4.500" in tab.inner_text("#t2")


def test_only_our_script_may_run(chromium: Any, nasty: Response, tmp_path: Path) -> None:
    """Were a rollout's script to reach the page as one, its hash would still not be allowed."""
    broken = page.response_page(nasty).replace("<h1>", "<script>document.title = 'run'</script><h1>")
    tab = chromium.new_page()
    tab.goto(written(tmp_path, broken).as_uri())
    assert tab.title() != "run"
    tab.click("#tokens a >> nth=1")
    assert tab.inner_text("#panel dd") == "2"
    tab.close()


def test_aggregates_as_charts_with_their_values(chromium: Any, run: Path, tmp_path: Path) -> None:
    found = inspect_all(run / "scores", InspectConfig(opener=0.3))
    found.mass.add(np.array([0.25, 0.95, 0.96]))
    with opened(chromium, written(tmp_path, page.aggregate_page(found, NASTY)), **PHONE) as tab:
        assert tab.inner_text("h1").endswith(NASTY)
        assert tab.evaluate("document.documentElement.scrollWidth") <= 390
        titles = tab.eval_on_selector_all("figcaption", "all => all.map(one => one.innerText)")
        tab.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true })")
        tables = tab.eval_on_selector_all(
            "figure tbody", "all => all.map(t => [...t.rows].map(r => [...r.cells].map(c => Number(c.innerText))))"
        )
    values = dict(zip(titles, tables, strict=True))
    means = np.array(values["Mean entropy by position"])[:, 1:]
    assert means == pytest.approx(found.by_position.T, rel=1e-3)
    assert [tuple(map(int, row)) for row in values["Opener lengths"]] == found.lengths
    for title, one in (("Gate weights", found.gates), ("Agreement of both rankings", found.agreement)):
        assert [row[1] for row in values[title]] == one.counts.tolist()
    assert [row for row in values["Captured mass"] if row[1]] == [[0.25, 1], [0.95, 2]]
