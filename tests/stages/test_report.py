"""A report in a real browser: its numbers are the artifacts', text stays text, and it reads on any screen."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser import browser, opened
from tests.runs import KEYS, NASTY, checkpoint, log, make_run, results, rollouts, scores
from tsdkd.artifacts import JOURNAL, MANIFEST, load_manifest
from tsdkd.errors import InputError
from tsdkd.stages.report import report
from tsdkd.stages.reporting import curves

LIMIT = 5_000_000
"""Bytes of a page."""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as one:
        yield one


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "a", direct_weight=10.0)


@pytest.fixture(scope="module")
def page(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report([run], tmp_path_factory.mktemp("page") / "one.html")


@pytest.fixture(scope="module")
def several(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    other = make_run(tmp_path_factory.mktemp("runs") / "b", seed=1, steps=12, direct_weight=1.0, response="plain")
    return report([run, other], tmp_path_factory.mktemp("page") / "two.html")


def rows(tab: Any, place: str) -> list[list[str]]:
    """Cells of the tables there, in order, hidden ones too."""
    found: list[list[str]] = tab.evaluate(
        f"[...document.querySelectorAll({place!r})].map(r => [...r.cells].map(c => c.textContent.trim()))"
    )
    return found


def after(heading: str, what: str) -> str:
    """Elements between a heading and the next."""
    return f"#{heading} ~ {what}"


def chart(tab: Any, title: str) -> list[list[str]]:
    """The values beside a chart."""
    found: list[list[str]] = tab.evaluate(
        "title => [...[...document.querySelectorAll('figure')].find(f => f.querySelector('figcaption').textContent"
        " == title).querySelectorAll('tr')].map(r => [...r.cells].map(c => c.textContent))",
        title,
    )
    return found


def test_every_curve_is_its_own_measure(chromium: Any, page: Path) -> None:
    """The log's values differ from measure to measure: `KEYS`' number, plus a thousandth a step."""
    with opened(chromium, page) as tab:
        for measure in (*curves.TRAINING, *curves.HEALTH):
            head, *values = chart(tab, measure.title)
            assert len(head) == 1 + len(measure.curves)
            assert [row[0] for row in values] == [str(step) for step in range(1, 9)]
            for column, name in enumerate(measure.curves, 1):
                expected = 0 if name == "repeating" else KEYS.index(name) + 1 + 0.008
                assert float(values[-1][column]) == pytest.approx(expected, rel=1e-3), name
        assert chart(tab, "KL to the teacher, held-out prompts")[1:] == [["4", "0.5"], ["8", "0.25"]]


def test_benchmarks_and_divergence_are_the_results(chromium: Any, page: Path) -> None:
    with opened(chromium, page) as tab:
        found = rows(tab, "tr")
        assert ["benchmark", "teacher", "student", "distilled"] in found
        assert ["gsm8k", "100.0 ± 12.5", "50.0 ± 12.5", "75.0 ± 12.5"] in found
        assert ["distilled", "gsm8k", "+25.0 ± 47.9", "2", "1", "4", "1.000"] in found
        assert ["distilled", "0.9000 ± 0.0100", "0.750", "2.000"] in found  # the length of its name
        _, values = chart(tab, "Accuracy with 95 % intervals")
        assert values == ["gsm8k", "100 (75.5 to 124.5)", "50 (25.5 to 74.5)", "75 (50.5 to 99.5)"]


def test_before_is_the_student_and_after_is_the_distilled(chromium: Any, page: Path) -> None:
    """It gained documents 2 and 3, and lost document 0."""
    with opened(chromium, page) as tab:
        shown = tab.locator("article").all_inner_texts()
        assert len(shown) == 3
        for text in shown:
            number = re.search(r"document (\d)", text)
            assert number
            verdicts = ["right", "wrong"] if number[1] == "0" else ["wrong", "right"]
            assert text.startswith("Lost" if number[1] == "0" else "Gained")
            assert re.findall(r"^(student|distilled): (\w+)$", text, re.MULTILINE) == list(
                zip(("student", "distilled"), verdicts, strict=True)
            )
            assert text.index(f"student says {number[1]}") < text.index(f"distilled says {number[1]}")


def test_markup_in_prompts_and_answers_is_text(chromium: Any, page: Path) -> None:
    with opened(chromium, page) as tab:
        assert tab.title() == "a: tsdkd report"
        assert tab.locator("script, img").count() == 0
        assert f"How many? {NASTY}" in tab.inner_text("article pre >> nth=0")
        assert f"distilled answers {NASTY}" in tab.inner_text("main")


@pytest.mark.parametrize("width", [390, 1200])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["page", "several"])
def test_fits_the_screen(chromium: Any, name: str, width: int, scheme: str, request: pytest.FixtureRequest) -> None:
    with opened(
        chromium, request.getfixturevalue(name), viewport={"width": width, "height": 800}, color_scheme=scheme
    ) as tab:
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        assert tab.locator("figure").count() == tab.locator("figure table").count() > 10


def test_print_is_dark_on_white(chromium: Any, page: Path) -> None:
    with opened(chromium, page, color_scheme="dark") as tab:
        tab.emulate_media(media="print")
        assert tab.evaluate("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"


def test_several_runs_stand_side_by_side_differences_first(chromium: Any, several: Path) -> None:
    with opened(chromium, several) as tab:
        assert tab.inner_text("h2 >> nth=0") == "What differs between the runs"
        found = rows(tab, "#differences ~ .wide >> tr" if False else "tr")
        assert found[0] == ["setting", "a", "b"]
        assert ["checkpoint: objective.direct_weight", "10", "1"] in found
        assert ["rollouts: seed", "0", "1"] in found
        assert not any(row[0] == "rollouts: temperature" for row in found[: found.index(["rollouts: seed", "0", "1"])])
        head, *values = chart(tab, "Loss")
        assert head == ["step", "a", "b"]
        assert values[7] == ["8", "1.008", "1.008"]
        assert values[11] == ["12", "", "1.012"]
        assert ["benchmark", "a/distilled", "a/student", "b/distilled"] not in found
        shared = tab.locator("article").last.inner_text()
        assert "by seed 0" in shared
        assert "plain by seed 1" in shared


def test_results_that_runs_share_are_shown_once(run: Path, several: Path, chromium: Any) -> None:
    """Teacher, student and distilled have other answers in the second run, so all six are there; in a copy none are."""
    with opened(chromium, several) as tab:
        assert len(next(row for row in rows(tab, "tr") if row[0] == "benchmark")) == 1 + 6


def test_the_cost_and_the_commands_come_from_journals(run: Path, chromium: Any, tmp_path: Path) -> None:
    place = make_run(tmp_path / "timed")
    lines = [
        {"command": "tsdkd generate --run timed", "started": "2026-01-02T03:04:05+00:00", "machine": "2 cores"},
        {"exit": "interrupted", "seconds": 60.0, "memory": 10**9, "gpu_memory": None, "warnings": ["It smells."]},
        {"command": "tsdkd generate --run timed --again", "started": "2026-01-02T04:04:05+00:00", "machine": "2 cores"},
        {"exit": "finished", "seconds": 1174.0, "memory": 3 * 10**9, "gpu_memory": None, "warnings": ["It smells."]},
    ]
    (place / "rollouts" / JOURNAL).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (place / "scores" / JOURNAL).write_text(json.dumps(lines[0] | {"command": "tsdkd score"}) + "\n")
    with opened(chromium, report([place])) as tab:
        found = {row[0]: row[1:7] for row in rows(tab, "#cost + * tr")}
        ends = "1 interrupted, 1 finished"
        assert found["rollouts"] == [ends, "20 min 34 s", "1,234 tokens", "1.0", "3.00 GB", ""]
        assert found["scores"][:4] == ["1 killed", "not known", "1,234 tokens", ""]
        assert found["checkpoint"][:2] == ["not known", "not known"]
        text = tab.inner_text("main")
        assert text.count("rollouts: It smells.") == 1
        assert "count with no time: scores." in text
        assert "time and memory are not known: checkpoint, results/teacher" in text
        pres = tab.locator("#commands ~ pre").all_inner_texts()
        assert pres[:2] == ["tsdkd score", "tsdkd generate --run timed --again"]  # by the time of their last session
        assert pres[2].startswith("tsdkd train --run")


def test_an_unfinished_run_is_shown_as_far_as_it_is(chromium: Any, tmp_path: Path) -> None:
    """Training is at work: its log lies in resume/, and its last line is being written."""
    place = tmp_path / "half"
    rollouts(place)
    scores(place)
    checkpoint(place, 0, log(5))
    manifest = place / "checkpoint" / MANIFEST
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"state": "partial", "parts": [], "summary": {}}))
    (place / "checkpoint" / "resume").mkdir()
    entries = "".join(json.dumps(entry) + "\n" for entry in log(5))
    (place / "checkpoint" / "resume" / "metrics.jsonl").write_text(entries + '{"loss": 1.')
    (place / "checkpoint" / "metrics.jsonl").unlink()
    with opened(chromium, report([place])) as tab:
        assert chart(tab, "Loss")[-1] == ["5", "1.005"]
        text = tab.inner_text("main")
        assert "checkpoint: is not finished; run `tsdkd train` again" in text
        assert "There is no results in" in text
        assert "Nothing was measured yet." in text


def test_a_run_that_degenerates_is_warned_of_and_files_that_are_gone_are_missed(tmp_path: Path) -> None:
    place = tmp_path / "bad"
    rollouts(place)
    scores(place)
    checkpoint(place, 0, [entry | {"student_entropy": 5.0 if entry["step"] < 6 else 0.1} for entry in log(20)])
    (place / "rollouts" / "part-00000.parquet").unlink()
    (place / "prompts.jsonl").write_text("other\n")
    text = report([place]).read_text()
    assert "checkpoint: step 10: the student&#39;s entropy fell from 5 to 0.1." in text
    assert "rollouts: part-00000.parquet is missing." in text
    assert "rollouts: The prompts it was made from changed since" in text


def test_results_of_other_documents_do_not_stop_the_report(tmp_path: Path) -> None:
    results(tmp_path / "a", "student", "11")
    results(tmp_path / "a", "distilled", "1")
    file = tmp_path / "a" / "results" / "distilled"
    manifest = load_manifest(file)
    assert manifest.kind == "results"
    results(tmp_path / "b", "student", "11")
    assert "gsm8k" in report([tmp_path / "a"]).read_text()


def test_ten_thousand_steps_and_a_hundred_thousand_samples_stay_small(tmp_path: Path) -> None:
    """Ten runs of 10,000 steps overlaid; and one benchmark with answers of 100,000 documents."""
    runs = []
    for i in range(10):
        place = tmp_path / str(i)
        rollouts(place, seed=i)
        scores(place)
        checkpoint(place, i, log(10_000, 100))
        runs.append(place)
    results(runs[0], "student", "01" * 50_000, "x" * 50)
    results(runs[0], "distilled", "10" * 50_000, "x" * 50)
    assert report(runs, tmp_path / "ten.html").stat().st_size < LIMIT
    assert report(runs[:1], tmp_path / "one.html").stat().st_size < LIMIT


def test_thinned_curves_keep_means_range_and_end() -> None:
    entries = [{"loss": float(step % 2), "step": step} for step in range(1, 10_001)]
    found = curves.thinned("x", entries, "loss", 100)
    assert len(found.x) == 100
    assert found.x[-1] == 10_000
    assert set(found.y) == {0.5}
    assert found.low == [0.0] * 100
    assert found.high == [1.0] * 100
    few = curves.thinned("x", entries[:3], "loss", 100)
    assert (few.x, few.y, few.low) == ([1, 2, 3], [1.0, 0.0, 1.0], None)


def test_rounds_are_several_runs(tmp_path: Path) -> None:
    for number in (1, 2, 10):
        make_run(tmp_path / "rounds" / str(number), seed=number)
    page = report([tmp_path / "rounds"])
    assert page == tmp_path / "rounds" / "report.html"
    assert "<h1>1, 2, 10</h1>" in page.read_text()


def test_the_same_runs_make_the_same_page(run: Path, page: Path, tmp_path: Path) -> None:
    assert report([run], tmp_path / "again.html").read_bytes() == page.read_bytes()


def test_runs_that_cannot_be_told_apart(run: Path) -> None:
    with pytest.raises(InputError, match="named twice"):
        report([run, run])
