"""The report in a browser: it shows the artifacts' numbers, escapes text, and fits any screen."""

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from markupsafe import escape

from tests.helpers.browser import open_browser, open_page
from tests.helpers.runs import KEYS, MARKUP, VERDICTS, checkpoint, log, make_run, results, rollouts, scores
from tsdkd.artifacts.files import JOURNAL_FILE, MANIFEST_FILE, TIMES_FILE
from tsdkd.artifacts.manifest import load_manifest
from tsdkd.artifacts.writer import Writer
from tsdkd.errors import InputError
from tsdkd.stages.report import curves, descriptions, notes, responses
from tsdkd.stages.report.runs import load_runs
from tsdkd.stages.report.stage import _compare_results, _interval_charts, report

MAX_PAGE_BYTES = 5_000_000


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with open_browser() as chromium:
        yield chromium


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


def table_rows(tab: Any, selector: str) -> list[list[str]]:
    """The cells of the selected rows, including hidden ones."""
    cells: list[list[str]] = tab.evaluate(
        f"[...document.querySelectorAll({selector!r})].map(r => [...r.cells].map(c => c.textContent.trim()))"
    )
    return cells


def chart_rows(tab: Any, title: str) -> list[list[str]]:
    """The table of values of a chart."""
    cells: list[list[str]] = tab.evaluate(
        "title => [...[...document.querySelectorAll('figure')].find(f => f.querySelector('figcaption').textContent"
        " == title).querySelectorAll('tr')].map(r => [...r.cells].map(c => c.textContent))",
        title,
    )
    return cells


CHARTS = {
    "Loss": ["loss"],
    "Indirect": ["indirect"],
    "Direct": ["direct"],
    "Entropy": ["entropy"],
    "Mean entropy": ["student_entropy", "teacher_entropy"],
    "Top-1 agreement": ["top1_agreement"],
    "Rank agreement": ["rank_agreement"],
    "Mass outside the candidates": ["student_outside_mass", "teacher_outside_mass"],
    "Candidate overlap": ["candidate_overlap"],
    "Drift": ["drift"],
    "Gate": ["gate"],
    "Length": ["response_length", "opener_length"],
    "Truncated and repeating responses": ["truncated", "repeating"],
    "Shares of the gradient": [
        *("indirect_grad_share", "direct_grad_share", "entropy_grad_share", "policy_gradient_grad_share"),
    ],
    "Gradient norm": ["grad_norm"],
    "Learning rate": ["learning_rate"],
}


def test_every_chart_shows_its_own_metrics(chromium: Any, page: Path) -> None:
    """Each metric logs its number in `KEYS`, plus a thousandth per step."""
    with open_page(chromium, page) as tab:
        for title, names in CHARTS.items():
            head, *values = chart_rows(tab, title)
            assert len(head) == 1 + len(names)
            assert [row[0] for row in values] == [str(step) for step in range(1, 9)]
            for column, name in enumerate(names, 1):
                expected = 0 if name == "repeating" else KEYS.index(name) + 1 + 0.008
                assert float(values[-1][column]) == pytest.approx(expected, rel=1e-3), name
        for title, last in (("KL", "0.25"), ("top-1 agreement", "0.508"), ("student entropy", "3.008")):
            assert chart_rows(tab, f"Held-out {title}")[-1] == ["8", last]


def test_benchmarks_and_divergence_match_the_results(chromium: Any, page: Path) -> None:
    with open_page(chromium, page) as tab:
        rows = table_rows(tab, "tr")
        assert ["benchmark", "teacher", "student", "distilled"] in rows
        assert ["gsm8k", "100.0 ± 12.5", "50.0 ± 12.5", "75.0 ± 12.5"] in rows
        assert ["distilled", "gsm8k", "+25.0 ± 47.9", "2", "1", "4", "1.000"] in rows
        assert ["distilled", "0.9000 ± 0.0100", "0.750", "2.000"] in rows  # KL: see tests/helpers/runs.py
        _, values = chart_rows(tab, "Accuracy with 95 % intervals")
        assert values == ["gsm8k", "100 (75.5 to 124.5)", "50 (25.5 to 74.5)", "75 (50.5 to 99.5)"]


def test_gained_and_lost_documents_compare_student_and_distilled(chromium: Any, page: Path) -> None:
    """The distilled model gained documents 2 and 3, and lost document 0."""
    with open_page(chromium, page) as tab:
        texts = tab.locator("article").all_inner_texts()
        assert len(texts) == 3
        for text in texts:
            number = re.search(r"document (\d)", text)
            assert number
            verdicts = ["correct", "wrong"] if number[1] == "0" else ["wrong", "correct"]
            assert text.startswith("Lost" if number[1] == "0" else "Gained")
            assert re.findall(r"^(student|distilled): (\w+)$", text, re.MULTILINE) == list(
                zip(("student", "distilled"), verdicts, strict=True)
            )
            assert text.index(f"student responds {number[1]}") < text.index(f"distilled responds {number[1]}")


def test_markup_in_prompts_and_responses_stays_text(chromium: Any, page: Path) -> None:
    with open_page(chromium, page) as tab:
        assert tab.title() == "a: tsdkd report"
        assert tab.locator("script, img").count() == 0
        assert f"How many? {MARKUP}" in tab.inner_text("article pre >> nth=0")
        assert f"distilled responds {MARKUP}" in tab.inner_text("main")


@pytest.mark.parametrize("width", [390, 1200])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["page", "several"])
def test_the_page_fits_the_screen(
    chromium: Any, name: str, width: int, scheme: str, request: pytest.FixtureRequest
) -> None:
    with open_page(
        chromium, request.getfixturevalue(name), viewport={"width": width, "height": 800}, color_scheme=scheme
    ) as tab:
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        assert tab.locator("figure").count() == tab.locator("figure table").count() > 10


def test_print_is_black_on_white(chromium: Any, page: Path) -> None:
    with open_page(chromium, page, color_scheme="dark") as tab:
        tab.emulate_media(media="print")
        assert tab.evaluate("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"


def test_several_runs_are_compared_and_differences_come_first(chromium: Any, several: Path) -> None:
    with open_page(chromium, several) as tab:
        assert tab.inner_text("h2 >> nth=0") == "Differences between the runs"
        rows = table_rows(tab, "tr")
        assert rows[0] == ["setting", "a", "b"]
        assert ["checkpoint: objective.direct_weight", "10", "1"] in rows
        assert ["rollouts: seed", "0", "1"] in rows
        assert not any(row[0] == "rollouts: temperature" for row in rows[: rows.index(["rollouts: seed", "0", "1"])])
        head, *values = chart_rows(tab, "Loss")
        assert head == ["step", "a", "b"]
        assert values[7] == ["8", "1.008", "1.008"]
        assert values[11] == ["12", "", "1.012"]
        shared = tab.locator("article").last.inner_text()
        assert "by seed 0" in shared
        assert "plain by seed 1" in shared


def test_an_artifact_in_one_run_alone_is_one_difference(run: Path, tmp_path: Path) -> None:
    rollouts(tmp_path / "bare")
    rows = descriptions.differences_between(load_runs([run, tmp_path / "bare"]))
    assert [row for row in rows if row[0].startswith("scores")] == [["scores", "yes", "-"]]
    assert rows[0][1:] == ["yes", "-"]
    assert not any(row[0].startswith("checkpoint:") for row in rows)


def test_results_that_runs_share_are_compared_once(run: Path, tmp_path: Path) -> None:
    """Both runs have the same results of the student, and different ones of teacher and distilled model."""
    for name, verdicts in {"teacher": "1110", "student": VERDICTS["student"], "distilled": "1101"}.items():
        results(tmp_path / "b", name, verdicts, MARKUP)
    comparison, _ = _compare_results(load_runs([run, tmp_path / "b"]))
    assert comparison
    assert list(comparison.scores) == ["a/teacher", "a/student", "a/distilled", "b/teacher", "b/distilled"]
    assert comparison.baseline == "a/student"


def test_costs_and_commands_come_from_journals(run: Path, chromium: Any, tmp_path: Path) -> None:
    directory = make_run(tmp_path / "timed")
    lines = [
        {"command": "tsdkd generate --run timed", "started": "2026-01-02T03:04:05+00:00", "machine": "2 cores"},
        {
            "exit": "interrupted",
            "seconds": 60.0,
            "memory": 10**9,
            "gpu_memory": None,
            "warnings": ["The disk is slow."],
        },
        {"command": "tsdkd generate --run timed --again", "started": "2026-01-02T04:04:05+00:00", "machine": "2 cores"},
        {
            "exit": "finished",
            "seconds": 1174.0,
            "memory": 3 * 10**9,
            "gpu_memory": None,
            "warnings": ["The disk is slow."],
        },
    ]
    (directory / "rollouts" / JOURNAL_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (directory / "scores" / JOURNAL_FILE).write_text(json.dumps(lines[0] | {"command": "tsdkd score"}) + "\n")
    times = [{"step": 1, "sampling": 3.0, "student": 0.5, "whole": 4.0}, {"step": 2, "student": 1.5, "whole": 2.0}]
    (directory / "checkpoint" / TIMES_FILE).write_text("".join(json.dumps(line) + "\n" for line in times))
    with open_page(chromium, report([directory])) as tab:
        costs = {row[0]: row[1:7] for row in table_rows(tab, "#cost + * tr")}
        ends = "1 interrupted, 1 finished"
        assert costs["rollouts"] == [ends, "20 min 34 s", "1,234 tokens", "1.0", "3.00 GB", ""]
        assert costs["scores"][:4] == ["1 killed", "unknown", "1,234 tokens", ""]
        assert costs["checkpoint"][:2] == ["unknown", "unknown"]
        text = tab.inner_text("main")
        assert text.count("rollouts: The disk is slow.") == 1
        assert "Killed and running sessions have no recorded time: scores." in text
        assert "No journal records time and memory of checkpoint, results/teacher" in text
        assert "A step of checkpoint takes 3 s: sampling 50%, student 33%." in text
        pres = tab.locator("#commands ~ pre").all_inner_texts()
        assert pres[:2] == [
            "tsdkd score",
            "tsdkd generate --run timed --again",
        ]  # ordered by the start of the last session
        assert pres[2].startswith("tsdkd train --run")


def test_a_partial_run_is_shown(chromium: Any, tmp_path: Path) -> None:
    """Training still runs: its log is in resume/, and the last line is incomplete."""
    directory = tmp_path / "half"
    rollouts(directory)
    scores(directory)
    checkpoint(directory, 0, log(5))
    manifest = directory / "checkpoint" / MANIFEST_FILE
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"state": "partial", "parts": [], "summary": {}}))
    (directory / "checkpoint" / "resume").mkdir()
    entries = "".join(json.dumps(entry) + "\n" for entry in log(5))
    (directory / "checkpoint" / "resume" / "metrics.jsonl").write_text(entries + '{"loss": 1.')
    (directory / "checkpoint" / "metrics.jsonl").unlink()
    with open_page(chromium, report([directory])) as tab:
        assert chart_rows(tab, "Loss")[-1] == ["5", "1.005"]
        text = tab.inner_text("main")
        assert "checkpoint: incomplete (0 parts so far); run `tsdkd train` again." in text
        assert "This run has no results yet. Run `tsdkd eval" in text
        assert "No results yet." in text
        assert "No benchmark document has results of both the student and the distilled model." in text
        assert "Training held out no prompts." in text


def test_a_run_without_a_log_reports_no_held_out_prompts(tmp_path: Path) -> None:
    rollouts(tmp_path)
    text = report([tmp_path]).read_text()
    assert "Training has not logged a step yet." in text
    assert "held out no prompts" not in text
    assert "same score on every common document" not in text


def test_degeneration_is_reported() -> None:
    entries = [entry | {"student_entropy": 5.0 if entry["step"] < 6 else 0.1} for entry in log(20)]
    assert notes.degeneration_signs({"checkpoint": entries}) == [
        "checkpoint: step 10: the student's entropy fell from 5 to 0.1."
    ]
    assert notes.degeneration_signs({"checkpoint": log(20)}) == []


def test_missing_files_and_changed_parents_are_reported(tmp_path: Path) -> None:
    rollouts(tmp_path)
    (tmp_path / "rollouts" / "part-00000.parquet").unlink()
    (tmp_path / "prompts.jsonl").write_text("other\n")
    (run,) = load_runs([tmp_path])
    assert notes.run_warnings(run) == [
        "rollouts: part-00000.parquet is missing.",
        "rollouts: its parent ../prompts.jsonl (prompts) has changed since.",
    ]


def test_an_artifact_that_is_being_written_is_reported_as_such(tmp_path: Path) -> None:
    rollouts(tmp_path)
    begun = replace(load_manifest(tmp_path / "rollouts"), state="partial", parts=())
    shutil.rmtree(tmp_path / "rollouts")
    with Writer.open(tmp_path / "rollouts", begun):
        assert notes.run_warnings(*load_runs([tmp_path])) == [
            "rollouts: incomplete (0 parts so far); a stage is writing it."
        ]
    assert notes.run_warnings(*load_runs([tmp_path])) == [
        "rollouts: incomplete (0 parts so far); run `tsdkd generate` again."
    ]


def test_artifacts_are_described_in_sentences(tmp_path: Path) -> None:
    make_run(tmp_path, gate=False, opener="adaptive", em_weight=0.0)
    (run,) = load_runs([tmp_path])
    texts = dict(descriptions.describe_artifacts(run))
    assert texts["rollouts"] == (
        "The student small responded to 4 prompts of prompts.jsonl: temperature 0.5, at most 32 tokens, engine "
        "transformers, seed 0. 4 responses, 1 truncated."
    )
    manifest = load_manifest(tmp_path / "rollouts")
    manifest = replace(manifest, config=manifest.config | {"rollout_tokens": 9, "stop": ["a"]})
    rollouts_of = next(artifact for artifact in run.artifacts if artifact.manifest.kind == "rollouts")
    sentence = descriptions._describe_rollouts(replace(rollouts_of, manifest=manifest))
    assert "at most 32 tokens, cut after 9 tokens, ended by 'a', engine" in sentence
    assert "8 steps of 8 responses, 1 epoch, seed 0. Trained: all weights, learning rate 5e-06" in texts["checkpoint"]
    assert texts["checkpoint"].endswith(
        "Method tsdkd: 0.1 \u00d7 indirect (ranking of 10 candidates in an adaptive opener) + 1 \u00d7 direct "
        "(JSD with β = 0.9, without a gate)."
    )
    assert texts["results/student"] == (
        "The model student was measured on gsm8k (4 documents, 5 shots) and on 64 held-out responses."
    )
    assert descriptions.differences_to_paper(run) == [
        ("objective.gate", "False", "True"),
        ("objective.opener", "adaptive", "0.1"),
        ("objective.em_weight", "0", "1"),
        ("epochs", "1", "3"),
        ("batch_size", "8", "128"),
    ]


def test_results_without_common_documents_do_not_stop_the_report(tmp_path: Path) -> None:
    results(tmp_path, "student", "11")
    results(tmp_path, "distilled", "11", first=2)
    comparison, comparison_warnings = _compare_results(load_runs([tmp_path]))
    assert comparison
    assert comparison.scores.keys() == comparison.held_out.keys() == {"student", "distilled"}
    assert comparison.differences == {"distilled": {}}
    assert comparison_warnings[0].startswith(
        "Results are not compared: distilled and student have no documents of gsm8k in common"
    )
    text = report([tmp_path]).read_text()
    assert "No results yet" not in text
    assert "No results contain a divergence" not in text
    assert "No benchmark document has results of both the student and the distilled model." in text


def test_long_runs_make_small_pages(tmp_path: Path) -> None:
    """Two runs of 10,000 steps, one of them with results of 10,000 documents."""
    directories = [tmp_path / str(i) for i in range(2)]
    for directory in directories:
        rollouts(directory)
        scores(directory)
        checkpoint(directory, 0, log(10_000, 100))
    results(directories[0], "student", "01" * 5_000, "x" * 5_000)
    results(directories[0], "distilled", "10" * 5_000, "x" * 5_000)
    assert report(directories, tmp_path / "page.html").stat().st_size < MAX_PAGE_BYTES


def test_thinned_curves_keep_mean_range_and_end() -> None:
    entries = [{"loss": float(step % 2), "step": step} for step in range(1, 10_001)]
    curve = curves.thin("x", entries, "loss", 100)
    assert len(curve.x) == 100
    assert curve.x[-1] == 10_000
    assert set(curve.y) == {0.5}
    assert curve.low == [0.0] * 100
    assert curve.high == [1.0] * 100
    few = curves.thin("x", entries[:3], "loss", 100)
    assert (few.x, few.y, few.low) == ([1, 2, 3], [1.0, 0.0, 1.0], None)


def test_a_run_without_values_keeps_an_empty_curve() -> None:
    chart, *_ = curves.draw_charts(curves.HELD_OUT_CHARTS, {"a": log(4), "b": log(4, 2)})
    assert chart.columns == ["step", "a", "b"]
    assert [row[1:] for row in chart.rows] == [["", "1"], ["", "0.5"]]


def test_a_directory_of_rounds_is_several_runs_in_order(tmp_path: Path) -> None:
    for number in (10, 2, 1):
        rollouts(tmp_path / str(number))
    assert [run.name for run in load_runs([tmp_path])] == ["1", "2", "10"]


def test_pages_are_reproducible(run: Path, page: Path, tmp_path: Path) -> None:
    assert report([run], tmp_path / "again.html").read_bytes() == page.read_bytes()


def test_a_changed_weight_alone_is_no_gain(tmp_path: Path) -> None:
    """The scores are equal, and the documents' weights differ."""
    for name, weight in (("student", 1.0), ("distilled", 2.0)):
        results(tmp_path, name, "01", weight=weight)
    assert responses.compare_before_and_after(*load_runs([tmp_path])) == []


def test_scores_without_an_error_have_no_interval(tmp_path: Path) -> None:
    results(tmp_path, "qwen2.5-1.5b", "01")
    comparison, _ = _compare_results(load_runs([tmp_path]))
    assert comparison
    chart, *_ = _interval_charts(comparison)
    values = dict(zip(chart.columns, chart.rows[0], strict=True))
    assert values["qwen2.5-1.5b"] == "50 (25.5 to 74.5)"
    assert "(" not in values["paper: tsdkd"]
    assert float(values["paper: tsdkd"]) > 0


def test_hidden_directories_and_other_manifests_are_no_artifacts(tmp_path: Path) -> None:
    rollouts(tmp_path)
    rollouts(tmp_path / ".old")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / MANIFEST_FILE).write_text('{"name": "a web page", "icons": []}')
    assert [artifact.name for run in load_runs([tmp_path]) for artifact in run.artifacts] == ["rollouts"]


def test_a_file_may_vanish_while_sizes_are_summed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rollouts(tmp_path)
    (tmp_path / "rollouts" / "gone").write_text("x")
    stat = Path.stat

    def vanish(path: Path, **options: Any) -> Any:
        result = stat(path, **options)
        if path.name == "gone":
            path.unlink()
        return result

    monkeypatch.setattr(Path, "stat", vanish)
    (run,) = load_runs([tmp_path])
    assert run.artifacts[0].bytes > 0


def test_a_method_without_a_teacher_signal_has_a_cross_entropy_and_no_kl(tmp_path: Path) -> None:
    """It needs no scores and has no teacher entropy."""
    for name, method, divergence in (("a", "tsdkd", "eval_kl"), ("b", "seqkd", "eval_cross_entropy")):
        directory = tmp_path / name
        rollouts(directory)
        scores(directory)
        checkpoint(directory, 0, log(8, 4, divergence), method=method)
    shutil.rmtree(tmp_path / "b" / "scores")
    runs = load_runs([tmp_path / "a", tmp_path / "b"])
    assert not any("scores" in line for line in notes.missing_artifacts(runs[1]))
    logs = curves.load_logs(runs)
    charts = curves.draw_charts((*curves.HELD_OUT_CHARTS, *curves.HEALTH_CHARTS), logs)
    last_rows = {chart.title: chart.rows[-1] for chart in charts}
    assert last_rows["Held-out KL"] == ["8", "0.25", ""]
    assert last_rows["Held-out cross-entropy"] == ["8", "", "0.25"]
    assert last_rows["Mean entropy"][-1] == ""
    without_teacher, *_ = curves.draw_charts(curves.HEALTH_CHARTS, {"b": logs["b"]})
    assert without_teacher.columns == ["step", "student entropy"]


@pytest.mark.parametrize(("beta", "name"), [(0.0, "forward KL"), (1.0, "reverse KL")])
def test_small_fractions_and_both_limits_of_the_jsd_are_described(tmp_path: Path, beta: float, name: str) -> None:
    make_run(tmp_path, em_ratio=0.005, opener=0.07, beta=beta)
    (run,) = load_runs([tmp_path])
    text = dict(descriptions.describe_artifacts(run))["checkpoint"]
    assert f"1 \u00d7 direct ({name}, JSD with β = {beta:g}, weighted by the gate)" in text
    assert "openers with 7% of the entropy" in text
    assert "entropy (of the 0.5% most uncertain tokens)" in text


def test_signs_are_reported_once_and_in_order(tmp_path: Path) -> None:
    """Both signs begin at step 10; the journal holds a warning of one of them, and another warning."""
    fallen = {"student_entropy": 0.1, "response_length": 1.0}
    entries = [entry | (fallen if entry["step"] > 5 else {"student_entropy": 5.0}) for entry in log(20)]
    signs = notes.degeneration_signs({"x": entries})
    assert [line.split(" fell")[0] for line in signs] == [
        "x: step 10: the student's entropy",
        "x: step 10: the length of its responses",
    ]
    rollouts(tmp_path)
    scores(tmp_path)
    checkpoint(tmp_path, 0, entries)
    warned = [f"The run degenerates at step 10: {signs[0].removeprefix('x: step 10: ')}", "The disk is slow."]
    lines = [{"command": "tsdkd train", "started": "2026-01-02T03:04:05+00:00", "machine": ""}, {"warnings": warned}]
    (tmp_path / "checkpoint" / JOURNAL_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert notes.run_warnings(*load_runs([tmp_path])) == ["checkpoint: The disk is slow."]


def test_a_run_named_twice_is_refused(run: Path) -> None:
    with pytest.raises(InputError, match="named twice"):
        report([run, run])


def test_the_page_tells_from_whom_scores_are_and_how_stale(tmp_path: Path) -> None:
    """At the first step and at the last one; an online checkpoint has no scores."""
    make_run(tmp_path)
    note = (
        "checkpoint: The student that is trained sampled the responses. The scores are of the student that is trained: "
        "they are fresh. Which teacher the student's start learned from is unknown: models/small holds no "
        "manifest.json, so it is not an artifact. At the last step: candidate overlap 9.01, drift 10.01 nats per token."
    )
    (run,) = load_runs([tmp_path])
    assert notes.provenance_notes(run) == [note]
    assert escape(note) in report([tmp_path]).read_text()
    (trained,) = run.trained
    online = replace(trained, manifest=replace(trained.manifest, config=trained.manifest.config | {"online": {}}))
    assert (
        notes.provenance_notes(replace(run, artifacts=(*run.of_kind("rollouts"), *run.of_kind("scores"), online))) == []
    )
    shutil.rmtree(tmp_path / "scores")
    assert notes.provenance_notes(*load_runs([tmp_path])) == []
