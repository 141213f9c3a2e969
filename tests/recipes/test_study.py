"""The miniature study: its task, its arms, its intervals, and a run of one arm from models to tables."""

import itertools
import json
import random
import shutil
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
import typer.main
from safetensors.torch import load_file

from recipes.bench.methods import ENTRIES
from recipes.experiment import arms, measures, models, sums
from recipes.experiment.entries import GKD
from recipes.experiment.plans import EVERY_PLAN, PLANS
from recipes.experiment.settings import Settings
from recipes.experiment.statistics import format_interval, holm, paired_differences, paired_p
from recipes.experiment.sums import SUMS
from recipes.experiment.task import END, Shape
from recipes.experiment.tasks import find_task
from recipes.study import health, plan_choices, report, run, story_choices
from recipes.study.questions import QUESTIONS, RATES, TERMS_OF_SUMS, StudyArm, every_arm
from recipes.study.results import Results, arm_of_task, read_results
from recipes.study.run import find_studies
from tests.helpers.models import save_tiny_model
from tsdkd.cli import app
from tsdkd.cli.train_config import read_objective
from tsdkd.errors import InputError
from tsdkd.stages.data.embedded import make as stories
from tsdkd.stages.metrics.log import METRICS_FILE
from tsdkd.stages.models.language_model import LanguageModel
from tsdkd.stages.models.load import load_model


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
    goals = [(-1, tmp_path / "0"), (0, tmp_path / "1")]
    models.make(SUMS, shape, 0, goals, dev, dev, lambda _: None, decay=False)
    assert not list((tmp_path / "0").iterdir())
    assert (tmp_path / "1" / "model.safetensors").is_file()


def test_one_training_makes_all_students_of_a_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task, trained = find_task(Settings("sums", "tiny")), []
    original = models._new_model
    monkeypatch.setattr(models, "_new_model", lambda *words: trained.append(words) or original(*words))
    outputs = {None: tmp_path / "student", 0: tmp_path / "student-from-0"}
    task.make_students(1, outputs)
    first, second = (load_file(output / "model.safetensors") for output in outputs.values())
    assert all(torch.equal(first[name], second[name]) for name in first)
    shutil.rmtree(outputs[0])
    task.make_students(1, outputs)
    task.make_students(1, outputs)
    assert outputs[0].is_dir()
    assert len(trained) == 2  # the first, and the one that was missing


def test_a_token_is_a_character() -> None:
    tokenizer, text = SUMS.tokenizer(), "7+8-3-9+4?7p8=5;5m3=2#2"
    ids = tokenizer(text + END).input_ids
    assert len(ids) == len(text) + 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("arm", every_arm(), ids=lambda arm: str(arm.of_seed(1, 1e-4).directory))
def test_every_arm_has_options_of_its_method(arm: StudyArm) -> None:
    words = arm.entry.train_options(5).split()
    context = typer.main.get_command(app).commands["train"].make_context("train", words)
    read_objective(context, arm.entry.definition)


def test_each_group_is_measured_against_gkd_and_no_two_arms_share_a_directory() -> None:
    groups = [group for question in QUESTIONS for group in question.groups]
    assert {(group[0].entry.method, group[0].entry.options) for group in groups} == {(GKD.method, GKD.options)}
    assert len({(arm.task, arm.of_seed(1, 1e-4).directory) for arm in every_arm()}) == len(every_arm())


def test_a_name_is_the_same_entry_in_the_study_and_the_bench() -> None:
    """They may share a directory."""
    entries = [*ENTRIES.values(), *(arm.entry for arm in every_arm())]
    assert len({entry.name for entry in entries}) == len(set(entries))


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


def test_two_arms_run_from_models_to_tables(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["run", str(tmp_path), "--seeds", "1", "--scale", "tiny", "--workers", "1"]
    monkeypatch.setattr(sys, "argv", words)
    run.main()
    assert "sums, seed 1: 3 of 3 arms to run" in capsys.readouterr().out
    assert len(list(tmp_path.rglob("result.json"))) == 3  # the student before, and the arms
    monkeypatch.setattr(sys, "argv", words)
    run.main()
    assert "sums, seed 1: 0 of 3 arms to run" in capsys.readouterr().out
    lines = report.format_tables(read_results(tmp_path, tmp_path / "none")).splitlines()
    assert {line.split(" | ")[0] for line in lines} >= {"| sums", "| gate", "| direct (GKD, β 0.9)"}
    rows = read_results(tmp_path, tmp_path / "none").rows()
    written = [tuple(row[name] for name in ("task", "method", "rate", "start", "seed")) for row in rows]
    assert written == [("sums", "before", 0, None, 1), *(("sums", m, 1e-4, None, 1) for m in ("gkd", "tsdkd-gate"))]
    student, *trained = health.measure_arms(tmp_path / "sums")
    assert [row[:2] for row in (student, *trained)] == [
        ["student", "1"],
        ["gkd-0.0001", "1"],
        ["tsdkd-gate-0.0001", "1"],
    ]
    assert len(student) == len(health.COLUMNS)


def test_choices_among_plans_are_measured_for_each_arm_and_temperature(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seed 1 takes one plan in half of four responses, seed 2 in all; the search's seed is left out."""
    texts = {"seed-1": ["a2#12", "a2#12", "b3#12", "c4#13"], "seed-2": ["a2#12"] * 4}
    for seed, name in (("seed-0", "sampled"), ("seed-1", "sampled"), ("seed-2", "sampled"), ("seed-2", "sampled-0.5")):
        (tmp_path / seed / "gkd-0.0001" / name).mkdir(parents=True)

    def read(rollouts: Path) -> list[tuple[str, str]]:
        return [("120900000000?", text) for text in texts[rollouts.parts[-3]]]

    monkeypatch.setattr(plan_choices, "read_responses", read)
    assert plan_choices.measure_arms(tmp_path) == [
        ["gkd-0.0001", "2", "87.5 ± 158.8", "75.0 ± 317.7", "0.52 ± 6.61"],
        ["gkd-0.0001 at 0.5", "1", "100.0", "100.0", "0.00"],
    ]


def test_an_arm_responds_at_another_temperature(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[str] = []
    monkeypatch.setattr(arms, "run_tsdkd", lambda _, command: commands.append(command))
    for seed in ("seed-0", "seed-1"):
        (tmp_path / "plans" / seed).mkdir(parents=True)
    plan_choices.sample(tmp_path / "plans", "gkd-0.0016", 0.5)
    (command,) = commands
    assert "--student seed-1/gkd-0.0016/checkpoint --prompts test.jsonl" in command
    assert "--rollouts seed-1/gkd-0.0016/sampled-0.5 --temperature 0.5 " in command


def test_the_likelier_value_is_that_of_the_whole_logits(tmp_path: Path) -> None:
    model = load_model(str(save_tiny_model(tmp_path / "model", seed=1)))
    found = list(islice(stories.stories(1), 80))
    questions = [story_choices.make_question(model.tokenizer, story) for story in found]
    assert {len(question.ids) for question in questions} != {len(questions[0].ids)}
    story, question = found[0], questions[0]
    text = model.tokenizer.decode(question.ids)
    assert text.endswith(f"{story['beginning']} ")
    assert [model.tokenizer.decode(token) for token in (question.right, question.wrong)] == [
        value[0] for value in sorted(story["choices"], key=lambda value: value != story["answer"])
    ]
    expected = []
    for question in questions:
        logits = model.model(torch.tensor([question.ids])).logits[0, -1]
        expected.append(bool(logits[question.right] > logits[question.wrong]))
    assert list(story_choices.is_right_likelier(model, questions)) == expected
    assert set(expected) == {False, True}


def test_stories_are_compared_with_gkd_at_the_same_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = find_task(Settings("embedded"))
    prompt, story = next(iter(task.by_prompt.items()))
    right, wrong = sorted(story["choices"], key=lambda value: value != story["answer"])
    texts = {
        "teacher-train": ["neither", right],
        "before-test": [wrong],
        "gkd-5e-06": [f"{wrong}, {right}", f"not {right} but {wrong}", right, "neither"],
        "tsdkd-no-ranking-5e-06": [right, right, f"{right}, {wrong}", wrong],
        "tsdkd-2e-05": [right] * 4,
    }
    likelier = {
        "seed-1/student": 0.25,
        "seed-1/gkd-5e-06/checkpoint": 0.5,
        "seed-1/tsdkd-no-ranking-5e-06/checkpoint": 0.75,
        "seed-1/tsdkd-2e-05/checkpoint": 1.0,
    }
    for model in likelier:
        (tmp_path / model).mkdir(parents=True)
    for name in list(texts)[1:]:
        (tmp_path / "seed-1" / name / "greedy").mkdir(parents=True)
        (tmp_path / "seed-1" / name / measures.RESULT).touch()
    (tmp_path / "seed-1" / "not-finite-5e-06").mkdir()
    (tmp_path / "seed-1" / "not-finite-5e-06" / measures.RESULT).touch()
    monkeypatch.setattr(story_choices, "measure_choice", lambda _, model, asked: likelier[model])

    def read(rollouts: Path) -> list[tuple[str, str]]:
        name = rollouts.parent.name if rollouts.name == "greedy" else rollouts.name
        return [(prompt, text) for text in texts[name]]

    monkeypatch.setattr(story_choices, "read_responses", read)
    table = story_choices.format_rows(story_choices.measure_arms(tmp_path))
    assert table.splitlines()[2:] == [
        "| teacher-train | 1 |  |  | 50.0 |  | 50.0 |  | 0.0 |  | 50.0 |  |",
        "| before-test | 1 | 25.0 |  | 0.0 |  | 0.0 |  | 0.0 |  | 0.0 |  |",
        "| gkd-5e-06 | 1 | 50.0 |  | 25.0 |  | 50.0 |  | 50.0 |  | 25.0 |  |",
        "| tsdkd-2e-05 | 1 | 100.0 |  | 100.0 |  | 100.0 |  | 0.0 |  | 0.0 |  |",
        "| tsdkd-no-ranking-5e-06 | 1 | 75.0 | 25.0 | 50.0 | 25.0 | 75.0 | 25.0 | 25.0 | -25.0 | 0.0 | -25.0 |",
    ]


def test_a_measured_choice_is_kept(tmp_path: Path) -> None:
    model, asked = str(save_tiny_model(tmp_path / "model", seed=1)), list(islice(stories.stories(1), 20))
    measured = story_choices.measure_choice(tmp_path, model, asked)
    assert 0 < measured < 1
    assert story_choices.measure_choice(tmp_path, "no model", asked) == measured


def test_the_figure_of_learning_rates_has_a_panel_for_each_task_that_has_run(tmp_path: Path) -> None:
    question = next(question for question in RATES if question.groups[0][0].task == "sums")
    for seed, (factor, group) in itertools.product((1, 2), enumerate(question.groups)):
        arm = group[0].of_seed(seed, 1e-4)
        measures.write_result(tmp_path / "sums" / arm.directory, {"accuracy": 0.25 * seed + 0.125 * factor})
    expected = {2.5e-5: [25, 50], 1e-4: [37.5, 62.5], 4e-4: [50, 75]}
    results = read_results(tmp_path, tmp_path / "none")
    assert report._accuracies(results, question) == {"gkd": expected}
    report.draw_rates(results, tmp_path / "rates.svg")
    drawn = (tmp_path / "rates.svg").read_text()
    assert "<!-- sums -->" in drawn
    assert "<!-- plans -->" not in drawn
    report.draw_rates(Results({}), tmp_path / "rates.svg")
    assert not (tmp_path / "rates.svg").exists()


def test_a_report_joins_the_seeds_of_several_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task, arm = arm_of_task(TERMS_OF_SUMS[1])
    output = tmp_path / "study"
    for machine, seeds in (("a", (0, 1, 2)), ("b", (2, 3))):
        for seed in seeds:
            measured = {"entry": arm.entry.identity, "accuracy": seed + (machine == "b") / 4}
            measures.write_result(tmp_path / machine / task / replace(arm, seed=seed).directory, measured)
        monkeypatch.setattr(sys, "argv", ["report", str(tmp_path / machine), str(output)])
        report.main()
    rows = [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]
    assert [(row["seed"], row["accuracy"]) for row in rows] == [(1, 1.0), (2, 2.25), (3, 3.25)]  # not the search's 0
    assert (output / "tables.md").read_text().count("| gate | 0.0001 | 3 |") == 1
    rows[0]["entry"]["options"] = "--beta 0.1"
    (output / "results.jsonl").write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(InputError, match="rows of tsdkd-gate on sums with other options"):
        report.main()


def test_a_task_or_a_method_without_an_arm_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no arm on own"):
        find_studies(tmp_path, ["own"], "full", (1, 2, 3, 4))
    with pytest.raises(InputError, match="no method tip"):
        find_studies(tmp_path, ["sums"], "full", (1, 2, 3, 4), ["tsdkd", "tip"])


def test_named_methods_run_beside_gkd(tmp_path: Path) -> None:
    (chosen,) = find_studies(tmp_path, ["embedded"], "full", (1, 2, 3, 4), ["tsdkd"])
    assert [(arm.entry.name, arm.factor) for arm in chosen.arms] == [
        *(("gkd", 1), ("tsdkd", 1)),
        *(("gkd", 4), ("tsdkd", 4)),
    ]
    (chosen,) = find_studies(tmp_path, ["sums"], "full", (1,), ["tsdkd-half"])
    assert [arm.entry.name for arm in chosen.arms] == ["gkd-half", "tsdkd-half"]


def test_the_models_learn_from_no_problem_that_measures_them(monkeypatch: pytest.MonkeyPatch) -> None:
    task, without = find_task(Settings("sums")), []
    monkeypatch.setattr(models, "make", lambda *words, **_: without.extend(words[5]))
    task.make_students(1, {None: Path("missing")})
    measured = [row["prompt"] for split in ("validation", "test") for row in task.splits()[split]]
    assert set(measured) < set(without)
    assert len(without) == len(measured) + task.dev


def test_accuracy_is_over_all_beginnings(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    model = LanguageModel("tiny", None, PLANS.tokenizer())

    def respond(_: LanguageModel, prompts: list[list[int]], *__: object, **___: object) -> list[list[int]]:
        asked.extend(model.tokenizer.decode(prompt) for prompt in prompts)
        return [model.tokenizer("#12").input_ids, *([[]] * 19)]

    monkeypatch.setattr(models, "sample_responses", respond)
    problems = ["120900000000?"] * 20
    assert models.accuracy(PLANS, model, problems) == 1 / 20
    assert asked == [f"{problems[0]}{plan}" for plan in [*EVERY_PLAN, *EVERY_PLAN[:2]]]
