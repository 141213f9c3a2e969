"""A report in a real browser: its numbers are the artifacts', text stays text, and it reads on any screen."""

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.browser import browser, opened
from tests.helpers.runs import KEYS, NASTY, VERDICTS, checkpoint, log, make_run, results, rollouts, scores
from tsdkd.artifacts.manifest import JOURNAL_FILE, MANIFEST_FILE, load_manifest
from tsdkd.artifacts.writer import Writer
from tsdkd.errors import InputError
from tsdkd.stages.report import curves, descriptions, notes, samples
from tsdkd.stages.report.runs import find_runs
from tsdkd.stages.report.stage import _compared, _intervals, report

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


def chart(tab: Any, title: str) -> list[list[str]]:
    """The values beside a chart."""
    found: list[list[str]] = tab.evaluate(
        "title => [...[...document.querySelectorAll('figure')].find(f => f.querySelector('figcaption').textContent"
        " == title).querySelectorAll('tr')].map(r => [...r.cells].map(c => c.textContent))",
        title,
    )
    return found


CHARTS = {
    "Loss": ["loss"],
    "Ranking term": ["indirect"],
    "Divergence term": ["direct"],
    "Entropy term: the most uncertain tokens": ["entropy"],
    "Mean entropy": ["student_entropy", "teacher_entropy"],
    "Same best token as the teacher": ["top1_agreement"],
    "Agreement on the candidates' order": ["rank_agreement"],
    "Candidates as scored": ["candidate_overlap"],
    "Drift since scoring": ["drift"],
    "Weight of the gate": ["gate"],
    "Length": ["response_length", "opener_length"],
    "Responses cut off or repeating": ["truncated", "repeating"],
    "Gradient norm before clipping": ["grad_norm"],
    "Learning rate": ["learning_rate"],
}


def test_every_curve_is_its_own_measure(chromium: Any, page: Path) -> None:
    """The log's values differ from measure to measure: `KEYS`' number, plus a thousandth a step."""
    with opened(chromium, page) as tab:
        for title, names in CHARTS.items():
            head, *values = chart(tab, title)
            assert len(head) == 1 + len(names)
            assert [row[0] for row in values] == [str(step) for step in range(1, 9)]
            for column, name in enumerate(names, 1):
                expected = 0 if name == "repeating" else KEYS.index(name) + 1 + 0.008
                assert float(values[-1][column]) == pytest.approx(expected, rel=1e-3), name
        for title, last in (("KL to the teacher", "0.25"), ("Same best token", "0.508"), ("Entropy", "3.008")):
            assert chart(tab, f"{title}, held-out prompts")[-1] == ["8", last]


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
        found = rows(tab, "tr")
        assert found[0] == ["setting", "a", "b"]
        assert ["checkpoint: objective.direct_weight", "10", "1"] in found
        assert ["rollouts: seed", "0", "1"] in found
        assert not any(row[0] == "rollouts: temperature" for row in found[: found.index(["rollouts: seed", "0", "1"])])
        head, *values = chart(tab, "Loss")
        assert head == ["step", "a", "b"]
        assert values[7] == ["8", "1.008", "1.008"]
        assert values[11] == ["12", "", "1.012"]
        shared = tab.locator("article").last.inner_text()
        assert "by seed 0" in shared
        assert "plain by seed 1" in shared


def test_an_artifact_that_a_run_lacks_is_one_difference(run: Path, tmp_path: Path) -> None:
    rollouts(tmp_path / "bare")
    found = descriptions.differences(find_runs([run, tmp_path / "bare"]))
    assert [row for row in found if row[0].startswith("scores")] == [["scores", "made", "-"]]
    assert found[0][1:] == ["made", "-"]
    assert not any(row[0].startswith("checkpoint:") for row in found)


def test_results_that_runs_share_are_compared_once(run: Path, tmp_path: Path) -> None:
    """The second run's student is the first's; its teacher and distilled model are others."""
    for name, verdicts in {"teacher": "1110", "student": VERDICTS["student"], "distilled": "1101"}.items():
        results(tmp_path / "b", name, verdicts, NASTY)
    comparison, _ = _compared(find_runs([run, tmp_path / "b"]))
    assert comparison
    assert list(comparison.scores) == ["a/teacher", "a/student", "a/distilled", "b/teacher", "b/distilled"]
    assert comparison.baseline == "a/student"


def test_the_cost_and_the_commands_come_from_journals(run: Path, chromium: Any, tmp_path: Path) -> None:
    place = make_run(tmp_path / "timed")
    lines = [
        {"command": "tsdkd generate --run timed", "started": "2026-01-02T03:04:05+00:00", "machine": "2 cores"},
        {"exit": "interrupted", "seconds": 60.0, "memory": 10**9, "gpu_memory": None, "warnings": ["It smells."]},
        {"command": "tsdkd generate --run timed --again", "started": "2026-01-02T04:04:05+00:00", "machine": "2 cores"},
        {"exit": "finished", "seconds": 1174.0, "memory": 3 * 10**9, "gpu_memory": None, "warnings": ["It smells."]},
    ]
    (place / "rollouts" / JOURNAL_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (place / "scores" / JOURNAL_FILE).write_text(json.dumps(lines[0] | {"command": "tsdkd score"}) + "\n")
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
    manifest = place / "checkpoint" / MANIFEST_FILE
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"state": "partial", "parts": [], "summary": {}}))
    (place / "checkpoint" / "resume").mkdir()
    entries = "".join(json.dumps(entry) + "\n" for entry in log(5))
    (place / "checkpoint" / "resume" / "metrics.jsonl").write_text(entries + '{"loss": 1.')
    (place / "checkpoint" / "metrics.jsonl").unlink()
    with opened(chromium, report([place])) as tab:
        assert chart(tab, "Loss")[-1] == ["5", "1.005"]
        text = tab.inner_text("main")
        assert "checkpoint: is not finished; run `tsdkd train` again" in text
        assert "holds no results yet: `tsdkd eval" in text
        assert "Nothing was measured yet." in text
        assert "No results hold documents that both the student and the distilled model answered." in text
        assert "Training held nothing out." in text


def test_nothing_is_said_of_what_was_not_logged(tmp_path: Path) -> None:
    rollouts(tmp_path)
    text = report([tmp_path]).read_text()
    assert "Training logged nothing yet." in text
    assert "held nothing out" not in text
    assert "answered differently" not in text


def test_a_run_that_degenerates_is_warned_of() -> None:
    entries = [entry | {"student_entropy": 5.0 if entry["step"] < 6 else 0.1} for entry in log(20)]
    assert notes.degenerations({"checkpoint": entries}) == [
        "checkpoint: step 10: the student's entropy fell from 5 to 0.1."
    ]
    assert notes.degenerations({"checkpoint": log(20)}) == []


def test_files_that_are_gone_or_changed_are_missed(tmp_path: Path) -> None:
    rollouts(tmp_path)
    (tmp_path / "rollouts" / "part-00000.parquet").unlink()
    (tmp_path / "prompts.jsonl").write_text("other\n")
    (run,) = find_runs([tmp_path])
    assert notes.warnings(run) == [
        "rollouts: part-00000.parquet is missing.",
        "rollouts: The prompts it was made from changed since (../prompts.jsonl).",
    ]


def test_what_is_being_written_is_no_failure(tmp_path: Path) -> None:
    rollouts(tmp_path)
    begun = replace(load_manifest(tmp_path / "rollouts"), state="partial", parts=())
    with Writer.open(tmp_path / "rollouts", begun, overwrite=True):
        assert notes.warnings(*find_runs([tmp_path])) == ["rollouts: is being written: 0 parts so far."]
    assert notes.warnings(*find_runs([tmp_path])) == [
        "rollouts: is not finished; run `tsdkd generate` again: 0 parts so far."
    ]


def test_settings_in_words(tmp_path: Path) -> None:
    make_run(tmp_path, gate=False, opener="adaptive", em_weight=0.0)
    (run,) = find_runs([tmp_path])
    said = dict(descriptions.sentences(run))
    assert said["rollouts"] == (
        "The student small answered 4 prompts of prompts.jsonl at temperature 0.5, with at most 32 tokens, by "
        "transformers, seed 0. 4 responses, 1 of them cut off."
    )
    assert "8 steps of 8 responses, 1 epoch, seed 0. Every weight learned at 5e-06" in said["checkpoint"]
    assert said["checkpoint"].endswith(
        "Objective tsdkd: 0.1 times the ranking of 10 candidates in an adaptive opener of the entropy; 1 times the JSD "
        "with β = 0.9 everywhere alike."
    )
    assert (
        said["results/student"] == "Measured: student, on gsm8k (4 documents, 5 shots), and on 64 held-out responses."
    )
    assert descriptions.departures(run) == [
        ("objective.gate", "False", "True"),
        ("objective.opener", "adaptive", "0.1"),
        ("objective.em_weight", "0", "1"),
        ("epochs", "1", "3"),
        ("batch_size", "8", "128"),
    ]


def test_results_of_other_documents_do_not_stop_the_report(tmp_path: Path) -> None:
    results(tmp_path, "student", "11")
    results(tmp_path, "distilled", "11", first=2)
    comparison, doubt = _compared(find_runs([tmp_path]))
    assert comparison
    assert comparison.scores.keys() == comparison.held_out.keys() == {"student", "distilled"}
    assert comparison.differences == {"distilled": {}}
    assert doubt[0].startswith("Results are not compared: distilled and student have no documents of gsm8k in common")
    text = report([tmp_path]).read_text()
    assert "Nothing was measured yet" not in text
    assert "No results hold a divergence" not in text
    assert "No results hold documents that both the student and the distilled model answered." in text


def test_ten_thousand_steps_and_many_samples_stay_small(tmp_path: Path) -> None:
    """Two runs of 10,000 steps overlaid, one of them with answers to 10,000 documents."""
    places = [tmp_path / str(i) for i in range(2)]
    for place in places:
        rollouts(place)
        scores(place)
        checkpoint(place, 0, log(10_000, 100))
    results(places[0], "student", "01" * 5_000, "x" * 5_000)
    results(places[0], "distilled", "10" * 5_000, "x" * 5_000)
    assert report(places, tmp_path / "page.html").stat().st_size < LIMIT


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


def test_a_run_keeps_its_colour_where_another_has_no_values() -> None:
    chart, *_ = curves.charts(curves.HELD_OUT, {"a": log(4), "b": log(4, 2)})
    assert chart.columns == ["step", "a", "b"]
    assert [row[1:] for row in chart.rows] == [["", "1"], ["", "0.5"]]


def test_rounds_are_several_runs_in_order(tmp_path: Path) -> None:
    for number in (10, 2, 1):
        rollouts(tmp_path / str(number))
    assert [run.name for run in find_runs([tmp_path])] == ["1", "2", "10"]


def test_the_same_runs_make_the_same_page(run: Path, page: Path, tmp_path: Path) -> None:
    assert report([run], tmp_path / "again.html").read_bytes() == page.read_bytes()


def test_gained_is_a_score_and_no_weight(tmp_path: Path) -> None:
    """The same verdicts; the weights differ, as where answers are weighed by what was kept of them."""
    for name, weight in (("student", 1.0), ("distilled", 2.0)):
        results(tmp_path, name, "01", weight=weight)
    assert samples.before_and_after(*find_runs([tmp_path])) == []


def test_what_has_no_error_has_no_range(tmp_path: Path) -> None:
    results(tmp_path, "qwen2.5-1.5b", "01")
    comparison, _ = _compared(find_runs([tmp_path]))
    assert comparison
    chart, *_ = _intervals(comparison)
    shown = dict(zip(chart.columns, chart.rows[0], strict=True))
    assert shown["qwen2.5-1.5b"] == "50 (25.5 to 74.5)"
    assert "(" not in shown["paper: tsdkd"]
    assert float(shown["paper: tsdkd"]) > 0


def test_what_others_wrote_and_hidden_folders_are_no_artifacts(tmp_path: Path) -> None:
    rollouts(tmp_path)
    rollouts(tmp_path / ".old")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / MANIFEST_FILE).write_text('{"name": "a web page", "icons": []}')
    assert [piece.name for run in find_runs([tmp_path]) for piece in run.pieces] == ["rollouts"]


def test_a_file_may_vanish_while_sizes_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rollouts(tmp_path)
    (tmp_path / "rollouts" / "gone").write_text("x")
    stat = Path.stat

    def vanish(path: Path, **more: Any) -> Any:
        found = stat(path, **more)
        if path.name == "gone":
            path.unlink()
        return found

    monkeypatch.setattr(Path, "stat", vanish)
    (run,) = find_runs([tmp_path])
    assert run.pieces[0].bytes > 0


def test_a_student_that_learns_by_heart_has_no_teacher_to_be_near(tmp_path: Path) -> None:
    """Its log's eval_kl is the cross-entropy of the answers; it needs no scores, and the teacher's entropy is none."""
    for name, method in (("a", "tsdkd"), ("b", "seqkd")):
        place = tmp_path / name
        rollouts(place)
        scores(place)
        checkpoint(place, 0, log(8, 4), method=method)
    shutil.rmtree(tmp_path / "b" / "scores")
    runs = find_runs([tmp_path / "a", tmp_path / "b"])
    assert not any("scores" in line for line in notes.missing(runs[1]))
    logs = curves.logs(runs)
    near, entropy = (
        {chart.title: chart.rows[-1] for chart in curves.charts(shown, logs)}
        for shown in (curves.HELD_OUT, curves.HEALTH)
    )
    assert near["KL to the teacher, held-out prompts"] == ["8", "0.25", ""]
    assert near["Cross-entropy of the teacher's answers, held-out prompts"] == ["8", "", "0.25"]
    assert entropy["Mean entropy"][-1] == ""
    alone, *_ = curves.charts(curves.HEALTH, {"b": logs["b"]})
    assert alone.columns == ["step", "student"]


def test_small_shares_and_the_ends_of_the_jsd_in_words(tmp_path: Path) -> None:
    for beta, said in ((0.0, "forward KL (JSD with β = 0)"), (1.0, "reverse KL (JSD with β = 1)")):
        make_run(tmp_path / said, em_ratio=0.005, opener=0.07, beta=beta)
        (run,) = find_runs([tmp_path / said])
        told = dict(descriptions.sentences(run))["checkpoint"]
        assert f"1 times the {said} where" in told
        assert "openers of 7% of" in told
        assert "entropy of the 0.5% most" in told


def test_signs_are_told_once_and_in_order(tmp_path: Path) -> None:
    """Both at step 10; the journal warned of one of them, and of something else."""
    fallen = {"student_entropy": 0.1, "response_length": 1.0}
    entries = [entry | (fallen if entry["step"] > 5 else {"student_entropy": 5.0}) for entry in log(20)]
    told = notes.degenerations({"x": entries})
    assert [line.split(" fell")[0] for line in told] == [
        "x: step 10: the student's entropy",
        "x: step 10: the length of its responses",
    ]
    rollouts(tmp_path)
    scores(tmp_path)
    checkpoint(tmp_path, 0, entries)
    warned = [f"The run degenerates at step 10: {told[0].removeprefix('x: step 10: ')}", "It smells."]
    lines = [{"command": "tsdkd train", "started": "2026-01-02T03:04:05+00:00", "machine": ""}, {"warnings": warned}]
    (tmp_path / "checkpoint" / JOURNAL_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert notes.warnings(*find_runs([tmp_path])) == ["checkpoint: It smells."]


def test_runs_that_cannot_be_told_apart(run: Path) -> None:
    with pytest.raises(InputError, match="named twice"):
        report([run, run])
