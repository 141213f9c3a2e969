"""A comparison in each format."""

import csv
import io
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.helpers.results import binary_scores, results
from tsdkd.cli import app


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with a teacher that is right in three of four documents, and a student that is right in one."""
    for name, correct in (("teacher", "1110"), ("student", "1000")):
        results(tmp_path / "run" / "results" / name, {"gsm8k": binary_scores(correct)}, f"Qwen2.5-1.5B {name}")
    return tmp_path / "run"


def show(*words: object, columns: str = "80") -> str:
    result = CliRunner().invoke(app, ["eval", "--compare", *map(str, words)], env={"COLUMNS": columns})
    assert result.exit_code == 0, result.output
    return result.stdout


def test_on_the_terminal(run: Path) -> None:
    shown = show(run)
    assert "75.0 ± 25.0" in shown
    assert "25.0 ± 25.0" in shown
    assert "difference to student on the same documents, points" in shown
    line = next(line for line in shown.splitlines() if "+50.0" in line)
    assert line.split() == ["teacher", "gsm8k", "+50.0", "±", "28.9", "2", "0", "4", "0.500"]
    assert ["gsm8k", "student", "25.0", "±", "25.0", "57.1"] in [
        line.split() for line in shown.splitlines()
    ]  # the paper's
    assert ["gsm8k", "tsdkd", "60.1"] in [line.split() for line in shown.splitlines()]
    assert "gkd" not in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_as_markdown(run: Path) -> None:
    lines = show(run, "--format", "markdown").splitlines()
    assert "| benchmark | model | measured | paper |" in lines
    assert "| gsm8k | teacher | 75.0 ± 25.0 | 80.3 |" in lines
    assert "| gsm8k | gkd |  | 57.9 |" in lines


def test_different_settings_and_truncated_responses_are_noted(run: Path) -> None:
    """In every format but CSV."""
    for name, limit, truncated in (("teacher", 4, 3), ("student", 2, 0)):
        manifest = run / "results" / name / "manifest.json"
        content = json.loads(manifest.read_text())
        content["config"]["limit"] = limit
        content["summary"]["gsm8k"]["truncated"] = truncated
        manifest.write_text(json.dumps(content))
    for format_ in ("terminal", "markdown", "latex"):
        shown = " ".join(show(run, "--format", format_).split())
        assert "teacher: its settings differ from those of student (limit 4 instead of 2)" in shown
        assert "teacher: responses are truncated at their limit (gsm8k 3 of 4)" in shown
    assert "settings differ" not in show(run / "results" / "student")


def test_incomplete_results_are_skipped(run: Path) -> None:
    manifest = run / "results" / "teacher" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"complete"', '"partial"'))
    result = CliRunner().invoke(app, ["eval", "--compare", str(run)])
    assert result.exit_code == 0
    assert f"{run / 'results' / 'teacher'} is incomplete: skipped." in result.stderr.replace("\n", "")
    assert "student" in result.stdout
    assert "75.0 ±" not in result.stdout
    alone = CliRunner().invoke(app, ["eval", "--compare", str(run / "results" / "teacher")])
    assert alone.exit_code != 0


def test_without_the_paper_models_stand_side_by_side(tmp_path: Path) -> None:
    results(tmp_path / "run" / "results" / "student", {"gsm8k": binary_scores("10")})
    results(tmp_path / "run" / "results" / "teacher", {"sciq": binary_scores("11")})
    lines = show(tmp_path / "run", "--format", "markdown").splitlines()
    assert "| gsm8k |  | 50.0 ± 50.0 |" in lines


def test_many_models_stand_one_beneath_the_other(tmp_path: Path) -> None:
    """Five columns would be folded on a terminal."""
    for directory in (tmp_path / f"supervised-kd-{i}" for i in range(5)):
        results(directory, {"gsm8k": binary_scores("10"), "sciq": binary_scores("10")})
    shown = show(*tmp_path.iterdir())
    assert ["gsm8k", "supervised-kd-3", "50.0", "±", "50.0"] in [line.split() for line in shown.splitlines()]


def test_one_benchmark_is_one_table_with_the_difference_to_each_baseline(tmp_path: Path) -> None:
    for name, correct in (("before", "1000"), ("start", "1100"), ("distilled", "1110")):
        results(tmp_path / "results" / name, {"sciq": binary_scores(correct)})
    lines = show(tmp_path, "--baseline", "before", "--baseline", "start", "--format", "markdown").splitlines()
    assert [line for line in lines if line.startswith("| ")] == [
        "| model | accuracy, % | vs before | p | vs start | p |",
        "| --- | --- | --- | --- | --- | --- |",
        "| distilled | 75.0 ± 25.0 | +50.0 ± 28.9 | 0.500 | +25.0 ± 25.0 | 1.000 |",
        "| before | 25.0 ± 25.0 |  |  | -25.0 ± 25.0 | 1.000 |",
        "| start | 50.0 ± 28.9 | +25.0 ± 25.0 | 1.000 |  |  |",
    ]


def test_several_benchmarks_have_a_table_of_differences_to_each_baseline(run: Path) -> None:
    shown = show(run, "--baseline", "student", "--baseline", "teacher")
    assert "difference to student" in shown
    assert "difference to teacher" in shown
    rows = list(
        csv.DictReader(io.StringIO(show(run, "--format", "csv", "--baseline", "student", "--baseline", "teacher")))
    )
    assert [(row["model"], row["baseline"], row["difference"]) for row in rows if row["difference"]] == [
        ("teacher", "student", "0.5"),
        ("student", "teacher", "-0.5"),
    ]


def test_a_named_table_has_rows_of_the_same_names(tmp_path: Path) -> None:
    results(tmp_path / "gate", {"gsm8k": binary_scores("1100"), "ifeval": binary_scores("1100")})
    shown = show(tmp_path / "gate", "--paper", "table-3")
    lines = [line.split() for line in shown.splitlines()]
    assert ["average", "gate", "50.0", "±", "20.4", "56.2"] in lines  # (58.3 + 54.2) / 2
    assert ["average", "tsdkd", "57.6"] in lines
    assert "paper, table-3: these numbers come from a text" in shown
    assert "gate+entropy" not in shown


def test_an_unknown_table_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    wrong = ["eval", "--paper", "table-0", "--model", "m=nowhere", "--results", str(tmp_path / "r")]
    result = CliRunner().invoke(app, wrong)
    assert result.exit_code == 2
    assert "'table-0' is not a table or figure of the paper" in result.stderr
    assert "figure-4" in result.stderr


def test_as_latex(run: Path) -> None:
    shown = show(run, "--format", "latex")
    assert r"gsm8k & teacher & 75.0 $\pm$ 25.0 & 80.3" in shown
    assert shown.count(r"\begin{tabular}") == shown.count(r"\end{tabular}") == 2


def test_as_csv(run: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(show(run, "--format", "csv"))))
    assert all(None not in row and None not in row.values() for row in rows)
    teacher = next(row for row in rows if row["model"] == "teacher")
    assert (teacher["accuracy"], teacher["documents"], teacher["difference"]) == ("0.75", "4", "0.5")
    assert (teacher["wins"], teacher["losses"], teacher["p"]) == ("2", "0", "0.5")
    assert next(row["accuracy"] for row in rows if row["model"] == "paper: gkd") == "0.579"


def test_results_get_the_shortest_distinct_names(run: Path, tmp_path: Path) -> None:
    other = results(tmp_path / "other" / "results" / "student", {"gsm8k": binary_scores("1100")})
    shown = show(run / "results" / "student", other.path, "--format", "csv", "--baseline", "run/student")
    assert {row["model"] for row in csv.DictReader(io.StringIO(shown)) if "paper" not in row["model"]} == {
        "run/student",
        "other/student",
    }
