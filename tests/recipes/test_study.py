"""The miniature study: its task, its arms, its intervals, and a run of one arm from models to tables."""

import json
import random
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import typer.main

from recipes.experiment import measures, models, sums
from recipes.experiment.statistics import format_interval, holm, paired_differences, paired_p
from recipes.experiment.sums import SUMS
from recipes.experiment.task import END, Shape
from recipes.study import health, report
from recipes.study.arms import GKD, MAIN, QUESTIONS, Arm, every_arm
from tsdkd.artifacts.manifest import Manifest
from tsdkd.artifacts.writer import Writer
from tsdkd.cli import app
from tsdkd.cli.train_config import read_objective
from tsdkd.stages.methods import find_method
from tsdkd.stages.metrics.log import METRICS_FILE

ROOT = Path(__file__).parents[2]


def test_a_solution_writes_every_step_and_ends_with_the_answer() -> None:
    solutions = {sums.solution("7+8-3-9+4?", random.Random(seed)) for seed in range(200)}
    assert len(solutions) == 2**4  # two ways to write each sign
    assert {text.translate(str.maketrans("pm", "+-")) for text in solutions} == {"7+8=5;5-3=2;2-9=3;3+4=7#7"}
    assert all(SUMS.is_correct("7+8-3-9+4?", text) for text in solutions)


@pytest.mark.parametrize("response", ["7+8=5;5-3=2;2-9=3;3+4=7#8", "7+8=5;5-3=2;2-9=3;3+4=7", "7", "", "#77"])
def test_other_responses_are_wrong(response: str) -> None:
    assert not SUMS.is_correct("7+8-3-9+4?", response)


def test_problems_are_distinct_and_excluded_ones_do_not_come() -> None:
    tested = frozenset(islice(SUMS.problems(0), 500))
    assert len(tested) == 500
    assert not tested & set(islice(SUMS.problems(0, tested), 5000))


def test_health_is_the_training_steps_and_not_the_measurements_between_them(tmp_path: Path) -> None:
    log = [{"loss": 1.0, "repeating": 0.25}, {"eval_kl": 0.5}, {"loss": 1.0, "repeating": 0.75}]
    (tmp_path / METRICS_FILE).write_text("".join(json.dumps(entry) + "\n" for entry in log))
    assert measures.training_health(tmp_path) == {"repeating": 0.5, "degenerated": False}


def test_a_model_that_was_saved_before_an_interruption_is_kept(tmp_path: Path) -> None:
    shape = Shape(width=8, inner=8, layers=1, rate=1e-3, steps=10, batch=2)
    dev = list(islice(SUMS.problems(0), 2))
    (tmp_path / "0").mkdir()
    models.make(SUMS, shape, 0, {-1: tmp_path / "0", 0: tmp_path / "1"}, dev, lambda _: None, decay=False)
    assert not list((tmp_path / "0").iterdir())
    assert (tmp_path / "1" / "model.safetensors").is_file()


def test_a_token_is_a_character() -> None:
    tokenizer, text = SUMS.tokenizer(), "7+8-3-9+4?7p8=5;5m3=2#2"
    ids = tokenizer(text + END).input_ids
    assert len(ids) == len(text) + 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("arm", every_arm(), ids=lambda arm: arm.slug)
def test_every_arm_has_options_of_its_method(arm: Arm) -> None:
    context = typer.main.get_command(app).commands["train"].make_context("train", arm.options.split())
    read_objective(context, find_method(context.params["method"]))


def test_each_group_is_measured_against_gkd_and_no_two_arms_share_a_directory() -> None:
    groups = [group for question in QUESTIONS for group in question.groups]
    assert {group[0].options for group in groups} == {GKD}
    settings = {(arm.options, arm.start, arm.data, arm.rate) for group in groups for arm in group}
    assert len(settings) == len({arm.slug for arm in every_arm()}) == len(every_arm())


def test_intervals_are_students() -> None:
    """Three seeds: t is 4.303 with two degrees of freedom, the standard error 1 / sqrt 3."""
    assert format_interval([1.0, 2.0, 3.0], 3) == "2.000 ± 2.484"
    assert format_interval([1.5]) == "1.5"


def test_differences_are_paired_by_seed() -> None:
    """Seeds differ by much more than arms; the arm misses one seed, the reference another."""
    runs = {seed: {"accuracy": value} for seed, value in {0: 0.5, 1: 0.9, 2: 0.1}.items()}
    reference = {seed: {"accuracy": value} for seed, value in {3: 0.3, 2: 0.0, 1: 0.8}.items()}
    assert paired_differences(runs, reference, "accuracy") == pytest.approx([0.1, 0.1])


def test_the_test_of_paired_differences_is_students() -> None:
    """Differences 1, 2, 3: t is 2 sqrt 3 with two degrees of freedom, and p = 1 - t / sqrt(t² + 2)."""
    assert paired_p([1.0, 2.0, 3.0]) == pytest.approx(1 - (12 / 14) ** 0.5)
    assert paired_p([0.0, 0.0]) == paired_p([1.0]) == 1
    assert paired_p([1.0, 1.0]) == 0


def test_holm_multiplies_the_smallest_p_by_the_number_of_methods_and_never_falls() -> None:
    assert holm({"a": 0.03, "b": 0.01, "c": 0.02, "d": 0.9}) == pytest.approx(
        {"b": 0.04, "c": 0.06, "a": 0.06, "d": 0.9}
    )


def test_complete_results_of_the_embedded_pair_count(tmp_path: Path) -> None:
    summary = {"embedded": {"value": 0.5}, "held_out": {"kl": 0.25}}
    for name in ("before", "gkd-1", "gkd-2"):
        with Writer.open(tmp_path / "pair" / "results" / name, Manifest("results", {}, 0)) as writer:
            if name != "gkd-2":
                writer.finish(summary)
    measured = {"accuracy": 0.5, "kl": 0.25}
    assert report.read_pair(tmp_path) == {"before": {0: measured}, "gkd": {1: measured}}


def test_one_arm_runs_from_models_to_tables(tmp_path: Path) -> None:
    run = [sys.executable, "-m", "recipes.study.run", tmp_path / "study", "--seeds", "0", "--scale", "tiny"]
    shown = subprocess.run(run, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert "seed 0: gate, indirect, entropy (TSD-KD): " in shown
    files = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("result.json")}
    assert len(files) == 2  # the student before, and the arm
    subprocess.run(run, cwd=ROOT, check=True, capture_output=True)
    assert files == {file: file.stat().st_mtime_ns for file in tmp_path.rglob("result.json")}
    assert "| student at 0 % |" in report.format_tables(tmp_path / "study")
    (row,) = health.measure_arms(tmp_path / "study", [replace(MAIN[-1], start=0)])
    assert len(row) == len(health.COLUMNS)
    assert row[:2] == ["k-5-start-0-student-rate-0.0001", "1"]
    assert sum(map(float, row[-1].split(", "))) == pytest.approx(1, abs=0.02)
