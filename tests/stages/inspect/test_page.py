"""Inspection pages in a browser: the artifact's numbers, selection by mouse, touch and keyboard, and escaped text."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.browser import open_browser, open_page
from tsdkd.artifacts.reader import read_artifact
from tsdkd.core import TSDKDConfig
from tsdkd.stages.config.inspect import InspectConfig
from tsdkd.stages.inspect import page
from tsdkd.stages.inspect.response import ENTROPY_LEVELS, Candidate, InspectedResponse, InspectedToken, TokenScores
from tsdkd.stages.inspect.stage import inspect_all, inspect_scores

MARKUP = "</script><script>document.title = 'run'</script><img src=x onerror=\"document.title = 'run'\">"
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
    with open_browser() as chromium:
        yield chromium


def token_scores(entropy: float, ranks: list[int], texts: tuple[str, str] = ("a", "b")) -> TokenScores:
    return TokenScores(entropy, 1.0, 1.0, [Candidate(text, rank) for text, rank in zip(texts, ranks, strict=True)])


def write_page(tmp_path: Path, content: str) -> Path:
    (tmp_path / "page.html").write_text(content, encoding="utf-8")
    return tmp_path / "page.html"


@pytest.fixture
def response_with_markup() -> InspectedResponse:
    """Tokens of every colour, one of them very long, and markup in every field of a rollout."""
    texts = [MARKUP, " two", "\n", "x" * 300, " five", " six"]
    entropies = [0.0, *ENTROPY_LEVELS]
    tokens = [
        InspectedToken(
            position=i + 1,
            text=text,
            gate=0.25,
            in_opener=i < 2,
            ends_opener=i == 1,
            in_entropy_term=i == 5,
            before=token_scores(entropy, [2, 1], (MARKUP, " b")),
            after=token_scores(5 - entropy, [1, 2]),
        )
        for i, (text, entropy) in enumerate(zip(texts, entropies, strict=True))
    ]
    return InspectedResponse(MARKUP, "stop", MARKUP, [("user", MARKUP)], TSDKDConfig(k=2), [0.1], tokens, MARKUP)


def test_the_table_shows_the_artifacts_numbers(chromium: Any, run: Path, tmp_path: Path) -> None:
    row = read_artifact(run / "scores", "scores").table().to_pylist()[2]
    response = inspect_scores(run / "scores", InspectConfig(sample_id=row["sample_id"]))
    with open_page(chromium, write_page(tmp_path, page.response_page(response))) as tab:
        cells = tab.evaluate(
            "[...document.querySelectorAll('#positions tbody tr')].map(r => [...r.cells].map(c => c.innerText))"
        )
        ranks = tab.evaluate("[...document.querySelectorAll('#positions b')].map(b => Number(b.textContent) - 1)")
    assert [float(line[3]) for line in cells] == pytest.approx(row["student_entropy"], abs=6e-4)
    assert [float(line[4]) for line in cells] == pytest.approx(row["teacher_entropy"], abs=6e-4)
    gaps = np.array(row["student_entropy"]) - np.array(row["teacher_entropy"])
    assert [float(line[5]) for line in cells] == pytest.approx(1 / (1 + np.exp(-gaps)), abs=6e-4)
    assert ranks == row["ranks"]
    assert ["opener" in line[2] for line in cells] == [token.in_opener for token in response.tokens]
    assert ["entropy" in line[2] for line in cells] == [token.in_entropy_term for token in response.tokens]


def test_a_click_shows_a_tokens_scores(chromium: Any, run: Path, tmp_path: Path) -> None:
    response = inspect_scores(run / "scores", InspectConfig())
    expected = [f"{candidate.text} {candidate.rank}" for candidate in response.tokens[3].before.candidates]
    with open_page(chromium, write_page(tmp_path, page.response_page(response))) as tab:
        assert tab.is_hidden("#panel")
        tab.click("#tokens a >> nth=3")
        assert tab.eval_on_selector_all("#panel li", "items => items.map(item => item.innerText)") == expected
        assert f"{response.tokens[3].before.student_entropy:.3f}" in tab.inner_text("#panel")
        assert tab.evaluate("location.hash") == ""  # the page does not scroll
        tab.hover("#tokens a >> nth=5")
        assert tab.inner_text("#panel dd") == "6"
        tab.hover("h1")
        assert tab.inner_text("#panel dd") == "4"


def test_keyboard_and_touch_show_a_tokens_scores(
    chromium: Any, response_with_markup: InspectedResponse, tmp_path: Path
) -> None:
    file = write_page(tmp_path, page.response_page(response_with_markup))
    with open_page(chromium, file) as tab:
        tab.focus("#tokens a")
        tab.keyboard.press("ArrowRight")
        assert tab.inner_text("#panel dd") == "2"
        tab.keyboard.press("ArrowLeft")
        tab.keyboard.press("ArrowLeft")  # the first token has no left neighbour
        assert tab.inner_text("#panel dd") == "1"
        tab.keyboard.press("Tab")
        assert tab.inner_text("#panel dd") == "2"
    with open_page(chromium, file, **PHONE) as tab:
        tab.tap("#tokens a >> nth=4")
        assert tab.inner_text("#panel dd") == "5"
        box = tab.query_selector("#panel").bounding_box()
        assert box["y"] + box["height"] <= PHONE["viewport"]["height"]


def test_without_scripts_a_token_links_to_its_row(
    chromium: Any, response_with_markup: InspectedResponse, tmp_path: Path
) -> None:
    with open_page(
        chromium, write_page(tmp_path, page.response_page(response_with_markup)), java_script_enabled=False
    ) as tab:
        tab.click("#tokens a >> nth=1")
        assert tab.url.endswith("#t2")
        assert "student 0.50, teacher 1.00 nats, gate 0.25" in tab.get_attribute("#tokens a >> nth=1", "title")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("screen", [PHONE, {"viewport": {"width": 1200, "height": 900}}], ids=["phone", "desktop"])
def test_markup_stays_text_and_text_stays_legible(
    chromium: Any, response_with_markup: InspectedResponse, tmp_path: Path, scheme: str, screen: dict[str, Any]
) -> None:
    with open_page(
        chromium, write_page(tmp_path, page.response_page(response_with_markup)), color_scheme=scheme, **screen
    ) as tab:
        tab.click("#tokens a >> nth=0")
        assert tab.title() == f"Response {MARKUP}, token by token"
        assert tab.inner_text("pre") == MARKUP
        assert tab.inner_text("#tokens a >> nth=0") == MARKUP
        assert tab.inner_text("#panel li >> nth=0").startswith(MARKUP.replace(" ", "\u2423"))
        assert tab.locator("img").count() == 0
        assert tab.locator("script").count() == 1
        assert tab.evaluate("document.documentElement.scrollWidth") <= screen["viewport"]["width"]
        body = tab.query_selector("body")
        for token in tab.query_selector_all("#tokens a"):
            assert tab.evaluate(CONTRAST, [token, body]) >= 4.5


def test_tokens_show_selection_and_entropy(
    chromium: Any, response_with_markup: InspectedResponse, tmp_path: Path
) -> None:
    """Each level has a colour; the opener ends after the second token; the switch shows entropies after training."""
    with open_page(chromium, write_page(tmp_path, page.response_page(response_with_markup))) as tab:

        def colours() -> list[str]:
            return list(
                tab.eval_on_selector_all("#tokens a", "all => all.map(a => getComputedStyle(a).backgroundColor)")
            )

        before = colours()
        assert len(set(before)) == 6
        marks = tab.evaluate("[...document.querySelectorAll('#tokens > *')].map(e => e.className.split(' ')[0])")
        assert marks == ["token", "token", "end", "token", "token", "token", "token"]
        boxed = tab.eval_on_selector_all("#tokens a", "all => all.map(a => getComputedStyle(a).boxShadow !== 'none')")
        assert boxed == [False] * 5 + [True]
        tab.check("#after")
        levels = [sum(5 - bound >= level for level in ENTROPY_LEVELS) for bound in (0.0, *ENTROPY_LEVELS)]
        assert colours() == [before[level] for level in levels]
        assert "0.500 \u2192 4.500" in tab.inner_text("#t2")


def test_the_content_policy_blocks_other_scripts(
    chromium: Any, response_with_markup: InspectedResponse, tmp_path: Path
) -> None:
    """An injected script does not run, because its hash is not allowed."""
    broken = page.response_page(response_with_markup).replace("<h1>", "<script>document.title = 'run'</script><h1>")
    tab = chromium.new_page()
    tab.goto(write_page(tmp_path, broken).as_uri())
    assert tab.title() != "run"
    tab.click("#tokens a >> nth=1")
    assert tab.inner_text("#panel dd") == "2"
    tab.close()


def test_the_aggregate_page_shows_the_aggregates(chromium: Any, run: Path, tmp_path: Path) -> None:
    aggregate = inspect_all(run / "scores", InspectConfig(opener=0.3))
    aggregate.captured_mass.add(np.array([0.25, 0.95, 0.96]))
    with open_page(chromium, write_page(tmp_path, page.aggregate_page(aggregate, MARKUP)), **PHONE) as tab:
        assert tab.inner_text("h1").endswith(MARKUP)
        assert tab.evaluate("document.documentElement.scrollWidth") <= 390
        titles = tab.eval_on_selector_all("figcaption", "all => all.map(e => e.innerText)")
        tab.evaluate("document.querySelectorAll('details').forEach(e => { e.open = true })")
        tables = tab.eval_on_selector_all(
            "figure tbody", "all => all.map(t => [...t.rows].map(r => [...r.cells].map(c => Number(c.innerText))))"
        )
    values = dict(zip(titles, tables, strict=True))
    means = np.array(values["Mean entropy by position"])[:, 1:]
    assert means == pytest.approx(aggregate.mean_entropy_by_position.T, rel=1e-3)
    assert [tuple(map(int, row)) for row in values["Opener lengths"]] == aggregate.opener_length_bins
    for title, histogram in (
        ("Gate weights", aggregate.gates),
        ("Agreement of student and teacher", aggregate.agreement),
    ):
        assert [row[1] for row in values[title]] == histogram.counts.tolist()
    assert [row for row in values["Captured mass"] if row[1]] == [[0.25, 1], [0.95, 2]]
