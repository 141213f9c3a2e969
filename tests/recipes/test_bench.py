"""The bench: its protocol, its methods, its statistics, and a run of the recipe from models to the page."""

import json
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import typer.main

from recipes.bench import page
from recipes.bench.methods import ENTRIES, choose_entries
from recipes.bench.plan import Plan, make_plan, seeds_of_students
from recipes.bench.run import Bench, choose_rate, main
from recipes.experiment import arms, commands
from recipes.experiment.arms import Arm
from recipes.experiment.conditions import Conditions, Sizes
from recipes.experiment.entries import GKD, Entry
from recipes.experiment.measures import RESULT
from recipes.experiment.settings import SETTINGS_FILE, Settings, read_numbers
from recipes.experiment.tables import COLUMNS, Row, format_table
from recipes.experiment.tasks import find_task
from recipes.experiment.workers import open_workers
from recipes.study import plan_choices
from tests.helpers.models import save_tiny_model
from tests.helpers.prompts import write_prompts
from tests.helpers.recipes import finish, start
from tsdkd.artifacts.locks import lock_for_writing
from tsdkd.cli import app
from tsdkd.cli.train_config import read_objective
from tsdkd.errors import InputError, NotFiniteError
from tsdkd.stages.data.embedded import make as stories
from tsdkd.stages.methods import METHODS, find_method

METHOD_FILE = """
from tsdkd.methods import Divergence, Method

METHOD = Method(
    name="mine",
    full_name="Mine",
    description="minimises reverse KL",
    losses={"divergence": Divergence.jsd(1)},
    select=lambda features, options: {"divergence": features.mean(features.mask)},
)
"""


@pytest.mark.parametrize(("seeds", "cause"), [((1, 2, 3), "only 3"), ((0, 1, 2, 3), "0 1 2 3"), ((1, 1, 2, 3), "1 1")])
def test_too_few_repeated_and_searched_seeds_are_refused(seeds: tuple[int, ...], cause: str) -> None:
    with pytest.raises(InputError, match=cause):
        Settings("sums", seeds=seeds).require_seeds()


def test_words_in_place_of_numbers_are_refused() -> None:
    with pytest.raises(InputError, match="SEEDS is 'one two'"):
        read_numbers("SEEDS", "one two", int)


def test_a_bench_keeps_its_settings_and_conditions_with_other_seeds_and_factors(tmp_path: Path) -> None:
    conditions = find_task(Settings("sums")).conditions
    Settings("sums").record(tmp_path, conditions)
    recorded = (tmp_path / SETTINGS_FILE).read_text()
    Settings("sums", seeds=(1, 2, 3, 4, 5), factors=(1.0, 64.0)).record(tmp_path, conditions)
    with pytest.raises(InputError, match="scale 'full' and not 'tiny', engine"):
        Settings("sums", "tiny", engine="vllm").record(tmp_path, conditions)
    with pytest.raises(InputError, match=r"has the bench of conditions.sizes.test 1000 and not 500\. Choose"):
        Settings("sums").record(tmp_path, replace(conditions, sizes=replace(conditions.sizes, test=500)))
    assert (tmp_path / SETTINGS_FILE).read_text() == recorded


@pytest.mark.parametrize("factors", [(1.0, 1.0), (0.0, 1.0), ()])
def test_a_grid_that_repeats_a_rate_or_has_none_is_refused(factors: tuple[float, ...]) -> None:
    with pytest.raises(InputError, match="factors are"):
        Settings("sums", factors=factors)


def test_a_second_bench_in_the_directory_is_refused_while_the_first_runs(tmp_path: Path) -> None:
    with lock_for_writing(tmp_path), pytest.raises(InputError, match="Another process"):
        Bench(tmp_path, Settings("sums"), choose_entries(GKD.name), workers=1).run(12, plan_only=False)
    assert [file.name for file in tmp_path.iterdir()] == [".lock"]


def test_every_method_of_the_registry_is_in_the_bench() -> None:
    assert {entry.method for entry in ENTRIES.values()} == METHODS.keys()
    assert choose_entries("")[0].name == GKD.name
    assert {entry.name for entry in choose_entries("")} == ENTRIES.keys()


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=lambda entry: entry.name)
def test_every_entry_has_options_of_its_method(entry: Entry) -> None:
    words = entry.train_options(5).split()
    context = typer.main.get_command(app).commands["train"].make_context("train", words)
    read_objective(context, find_method(context.params["method"]))


def test_k_is_given_to_methods_that_have_one() -> None:
    assert ENTRIES["tsdkd"].train_options(5) == "--method tsdkd --k 5"
    assert ENTRIES["tropd-loss"].train_options(5) == "--method tropd-loss --method-option k=5"
    assert ENTRIES["tsdkd"].train_options(None) == "--method tsdkd"
    assert ENTRIES[GKD.name].train_options(5) == "--method gkd --beta 0.9"


def test_chosen_methods_are_beside_the_reference_and_may_be_files(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(METHOD_FILE)
    assert [entry.name for entry in choose_entries(f"tip {file}")] == [GKD.name, "tip", "mine"]
    with pytest.raises(InputError, match="nonsense"):
        choose_entries("nonsense")


def write_result(root: Path, arm: Arm, **result: object) -> None:
    (root / arm.directory).mkdir(parents=True, exist_ok=True)
    (root / arm.directory / RESULT).write_text(json.dumps(result))


def test_the_rate_is_chosen_by_both_accuracies_and_then_by_divergence(tmp_path: Path) -> None:
    search = [Arm(0, "validation", ENTRIES["tip"], rate) for rate in (1e-5, 1e-4, 1e-3)]
    for sampled, best in (((0.5, 0.75, 0.5), 1e-4), ((0.5, 0.5, 0.5), 1e-3), ((0.875, 0.5, 0.5), 1e-5)):
        for arm, *values in zip(search, (0.5, 0.75, 0.75), sampled, (0.1, 0.4, 0.3), strict=True):
            write_result(tmp_path, arm, **dict(zip(("accuracy", "sampled_accuracy", "kl"), values, strict=True)))
        assert choose_rate(search, tmp_path) == best
    for arm, kl in zip(search, (0.1, 0.4, 0.3), strict=True):
        write_result(tmp_path, arm, kl=kl)
    assert choose_rate(search, tmp_path) == 1e-5


def fail(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    monkeypatch.setattr(commands, "app", lambda *_, **__: status)


def test_a_rate_whose_training_is_not_finite_is_the_worst(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, search = Settings("sums"), [page.search_arm(ENTRIES["tip"], rate) for rate in (1e-4, 1e-3)]
    fail(monkeypatch, 1)
    with pytest.raises(SystemExit):
        arms.run_arm(settings, tmp_path, search[0])
    fail(monkeypatch, NotFiniteError.exit_code)
    arms.run_arm(settings, tmp_path, search[0])
    write_result(tmp_path, search[1], accuracy=0.0, kl=100.0)
    assert choose_rate(search, tmp_path) == 1e-3
    failed = json.loads((tmp_path / search[0].directory / RESULT).read_text())
    measured = {"accuracy": 0.5, "sampled_accuracy": 0.25, "kl": 2.0}
    table = page._format_search([1e-4, 1e-3], {ENTRIES["tip"]: [failed, measured]})
    assert table.splitlines()[-1] == "| tip | not finite | 50.0 %, 25.0 %, 2.0000 |  |"
    runs_of_tip = {seed: {"accuracy": seed / 4, "degenerated": False} for seed in (2, 3)} | {1: failed}
    line = format_table([Row("tip", runs_of_tip, runs(0.5, 0.25, 0.5))]).splitlines()[-1]
    assert "| 1 of 3 |" in line
    assert "| 3 | 62.5 ± 158.8 (2 seeds) |  |" in line  # the difference of two seeds would be a choice


def test_a_trained_model_whose_logits_are_not_finite_has_no_measures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, arm = Settings("sums"), page.search_arm(ENTRIES["tip"], 1e-3)
    for name in ("_train", "training_costs", "training_health"):
        monkeypatch.setattr(arms, name, lambda *_: {})
    fail(monkeypatch, NotFiniteError.exit_code)
    arms.run_arm(settings, tmp_path, arm)
    assert json.loads((tmp_path / arm.directory / RESULT).read_text())["degenerated"]
    with pytest.raises(NotFiniteError):
        arms.run_arm(settings, tmp_path, Arm(0, "validation"))  # the student before training


@pytest.mark.parametrize(("split", "other"), [("validation", "test"), ("test", "validation")])
@pytest.mark.parametrize(("task", "limit"), [("sums", ""), ("embedded", "--limit 450 ")])
def test_a_model_is_measured_on_its_split_alone(
    task: str, limit: str, split: str, other: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    monkeypatch.setattr(arms, "run_tsdkd", lambda _, command: read.append(command))
    monkeypatch.setattr(arms, "response_measures", lambda *_: {"accuracy": 1.0})
    monkeypatch.setattr(arms, "divergence", lambda *found: read.extend(map(str, found)) or {"kl": 0.1})
    arms.measure(find_task(Settings(task)), tmp_path / "arm", "model", split)
    assert all(f"--prompts {split}.jsonl" in command for command in read[:2])
    assert "--temperature 0 --engine" in read[0]
    assert f"--temperature 1 {limit}" in read[1]
    assert read[-2:] == [f"teacher-{split}-held-out", f"{tmp_path}/{split}-held-out"]
    assert not [text for text in read if f"{other}.jsonl" in text or f"{other}-held-out" in text]


def test_a_probe_that_was_interrupted_starts_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "probe" / "tip" / "checkpoint").mkdir(parents=True)
    fail(monkeypatch, 1)
    with pytest.raises(SystemExit):
        arms.probe(Settings("sums"), tmp_path, ENTRIES["tip"], 0)
    assert not (tmp_path / "probe" / "tip" / "checkpoint").exists()


@pytest.mark.parametrize(("authors", "data"), [("teacher", "--rollouts teacher-train"), ("student", "--prompts train")])
def test_a_method_learns_from_responses_of_its_author(
    authors: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text(METHOD_FILE.replace('name="mine"', f'name="mine", authors=("{authors}",)'))
    commands: list[str] = []
    monkeypatch.setattr(arms, "run_tsdkd", lambda _, command: commands.append(command))
    arm = Arm(1, "test", choose_entries(f"{tmp_path}/mine.py")[1], 1e-4)
    arms._train(find_task(Settings("sums")), arm, tmp_path, "train")
    assert data in commands[0]


def test_an_arm_of_another_method_of_the_same_name_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arm = Arm(1, "test", ENTRIES["gkd"], 1e-4)
    assert not arm.is_complete
    write_result(tmp_path, arm, entry=arm.entry.identity)
    assert arm.is_complete
    with pytest.raises(InputError, match="other options"):
        _ = replace(arm, entry=Entry("gkd", "gkd", "--beta 0.1")).is_complete


def test_the_plan_counts_search_and_seeds_and_divides_by_workers(tmp_path: Path) -> None:
    """100 steps of 1 s and 20 s beside them: 8 trainings, 4 measured in 10 s and 4 in 30 s; 4 students."""
    for split, seconds in (("validation", 10.0), ("test", 30.0)):
        write_result(tmp_path, Arm(0, split), measuring_seconds=seconds)
    (tmp_path / "seed-0" / "student-seconds").write_text("60.0")
    settings = Settings("sums")
    task = replace(find_task(settings), conditions=Conditions(32, 48, 1e-4, Sizes(3200, 1, 1, 1)))
    probes = {GKD.name: {"step": 1.0, "other": 20.0}}
    plan = make_plan(tmp_path, settings, task, choose_entries(GKD.name), probes, workers=2)
    assert plan.methods == {GKD.name: 8 * 120 + 4 * 10 + 4 * 30}
    assert plan.hours == pytest.approx((1120 + 240 + 120) / 2 / 3600)
    plan.require_at_most(12)
    with pytest.raises(InputError, match="hours"):
        plan.require_at_most(0.1)


def runs(*accuracies: float, seconds: float = 1.0) -> dict[int, Mapping[str, float]]:
    return {
        seed: {"accuracy": value, "kl": 0.5, "seconds_per_step": seconds, "degenerated": False}
        for seed, value in enumerate(accuracies, 1)
    }


def test_the_table_has_paired_differences_with_holms_p() -> None:
    """Differences of 10, 11 and 12 points: t is 11 sqrt 3, p is 0.0027, and 0.0055 of two methods."""
    measured = {
        "gkd": runs(0.2, 0.5, 0.8),
        "better": runs(0.3, 0.61, 0.92, seconds=1.5),
        "level": runs(0.2, 0.5, 0.8),
    }
    before = runs(0.1, 0.1, 0.1)
    rows = [Row(name, found, measured["gkd"], "0.0004*") for name, found in measured.items()]
    lines = format_table([Row("before", before, before), *rows]).splitlines()
    cells = {line.strip("|").split(" | ")[0].strip(): line.strip("|").split(" | ") for line in lines[2:]}
    columns = ["name", *COLUMNS[1:4], "points"]
    assert dict(zip(columns, cells["better"], strict=False)) == {
        "name": " better",
        "learning rate": "0.0004*",
        "seeds": "3",
        "accuracy %": "61.0 ± 77.0",
        "points": "+11.0 ± 2.5 (p 0.005)",
    }
    assert cells["better"][-1].strip() == "1.50"
    assert cells["level"][1:5] == ["0.0004*", "3", "50.0 ± 74.5", "0.0 ± 0.0 (p 1.000)"]
    assert cells["gkd"][4] == cells["before"][4] == ""


@pytest.mark.parametrize("name", ["sums", "plans", "plans-short", "embedded"])
def test_splits_share_no_prompt(name: str) -> None:
    task = find_task(Settings(name))
    splits = task.splits()
    sizes = task.conditions.sizes
    assert {split: len(rows) for split, rows in splits.items()} == {
        "train": sizes.train,
        "validation": sizes.validation,
        "test": sizes.test,
    }
    prompts = [json.dumps(row) for rows in splits.values() for row in rows]
    assert len(set(prompts)) == len(prompts)


def test_the_embedded_task_trains_on_the_embedded_prompts_and_a_correct_response_names_one_value() -> None:
    task = find_task(Settings("embedded"))
    embedded = (stories.DIRECTORY / "prompts.jsonl").read_text().splitlines()
    assert [row["messages"] for row in task.splits()["train"]] == [json.loads(line)["messages"] for line in embedded]
    prompt = task.splits()["test"][0]["messages"][-1]["content"]
    story = task.by_prompt[prompt]
    right, wrong = story["answer"], next(value for value in story["choices"] if value != story["answer"])
    assert task.is_correct(prompt, f"The answer is {right}.")
    assert not task.is_correct(prompt, f"{right} or {wrong}")
    assert not task.is_correct(prompt, "Neither.")
    prompt, story = next((p, s) for p, s in task.by_prompt.items() if "hat" in s["choices"])
    wrong = next(value for value in story["choices"] if value != story["answer"])
    assert task.is_correct(prompt, f"That is what I know: the {story['answer']}.")
    assert not task.is_correct(prompt, f"That is what I know: the {wrong}.")


def test_a_users_own_task_needs_all_its_parts(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="BENCHMARK is missing"):
        find_task(Settings("own", teacher="a", student="b", prompts="c"))
    with pytest.raises(InputError, match="No task is named"):
        find_task(Settings("nonsense"))


@pytest.mark.parametrize(("benchmark", "cause"), [("nonsense", "is not a benchmark"), ("gsm8k,sciq", "names several")])
def test_a_users_own_task_has_one_known_benchmark(benchmark: str, cause: str) -> None:
    with pytest.raises(InputError, match=cause):
        find_task(Settings("own", teacher="a", student="b", prompts="c", benchmark=benchmark))


def test_a_users_own_task_runs_from_its_models_to_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path with a space, and the reference alone. A student that cannot be used leaves no directory."""
    teacher, student = (save_tiny_model(tmp_path / "my models" / str(seed), seed=seed) for seed in (1, 2))
    prompts = write_prompts(tmp_path / "prompts.jsonl", 12)
    fixed = "--task own --scale tiny --factors 1 --workers 1"
    words = ["run", str(tmp_path / "run"), *fixed.split()]
    words += [
        "--seeds",
        "1 2",
        "--methods",
        "gkd",
        "--teacher",
        str(teacher),
        "--prompts",
        str(prompts),
        "--benchmark",
        "embedded",
    ]
    words += ["--eval-options=--limit 2 --max-new-tokens 4", "--student"]
    monkeypatch.setattr(sys, "argv", [*words, str(tmp_path / "nothing")])
    with pytest.raises(SystemExit):
        main()
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(sys, "argv", [*words, str(student)])
    main()
    rows = [json.loads(line) for line in (tmp_path / "run" / page.ROWS).read_text().splitlines()]
    assert [(row["method"], row["seed"], row["split"], "accuracy" in row, "kl" in row) for row in rows] == [
        ("gkd", 0, "validation", False, True),
        ("before", 1, "test", True, True),  # seed 2 starts from the same student
        ("gkd", 1, "test", True, True),
        ("gkd", 2, "test", True, True),
    ]
    words = " ".join((tmp_path / "run" / page.PAGE).read_text().split())
    assert "with a seed that the test does not use" in words
    assert "The test is the benchmark." in words


def test_a_student_of_all_seeds_is_measured_once(tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl", 400)
    own = Settings("own", teacher="a", student="b", prompts=str(prompts), benchmark="gsm8k")
    assert seeds_of_students(find_task(own), own) == (1,)
    assert seeds_of_students(find_task(Settings("sums")), Settings("sums")) == (1, 2, 3, 4)


def test_a_users_own_task_trains_on_all_prompts_that_it_does_not_measure_on(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    settings = Settings("own", teacher="a", student="b", prompts=str(prompts), benchmark="gsm8k", response_tokens=9)
    prompts.write_text("".join(json.dumps({"prompt": f"prompt {i}"}) + "\n" for i in range(330)))
    task = find_task(settings)
    assert {name: len(rows) for name, rows in task.splits().items()} == {"validation": 128, "test": 128, "train": 64}
    assert task.splits()["train"][0]["messages"] == [{"role": "user", "content": "prompt 256"}]
    assert (task.conditions.benchmark, task.conditions.response_tokens) == ("gsm8k", 9)
    assert task.is_correct is None  # the benchmark measures accuracy


@pytest.mark.parametrize(
    ("text", "cause"), [('{"prompt": "one"}', "has 1 prompts"), ("[", "JSON list"), ("{", "line 1")]
)
def test_a_file_that_is_no_file_of_enough_prompts_is_refused(text: str, cause: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text(f"{text}\n")
    with pytest.raises(InputError, match=cause):
        find_task(Settings("own", teacher="a", student="b", prompts=f"{tmp_path}/prompts.jsonl", benchmark="gsm8k"))


def test_a_bench_runs_from_models_to_the_page_and_continues(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = "--task plans --scale tiny --seeds 1 --factors 1 --workers 1 --methods seqkd"
    monkeypatch.setattr(sys, "argv", ["run", str(tmp_path / "run"), *words.split(), "--plan-only"])
    main()
    assert "in all " in capsys.readouterr().out
    assert not (tmp_path / "run" / page.PAGE).exists()
    monkeypatch.setattr(sys, "argv", ["run", str(tmp_path / "run"), *words.split()])
    main()
    assert "search: 2 of 2 arms to run" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "run" / page.ROWS).read_text().splitlines()]
    assert {(row["method"], row["seed"], row["split"]) for row in rows} == {
        *((method, 0, "validation") for method in ("gkd", "seqkd")),
        *((method, 1, "test") for method in ("before", "gkd", "seqkd")),
    }
    assert all(row["steps"] == 2 and row["tokens"] > 0 for row in rows if row["method"] != "before")
    assert all("sampled_accuracy" in row for row in rows)
    text = (tmp_path / "run" / page.PAGE).read_text()
    assert "| seqkd | 0.0001 | 1 | " in text
    assert "| seqkd | 0.0 %, " in text  # the search
    assert (tmp_path / "run" / page.FIGURE).is_file()
    monkeypatch.setattr(sys, "argv", ["run", str(tmp_path / "run"), *words.split()])
    main()
    assert "seed 1: 0 of 3 arms to run" in capsys.readouterr().out
    measured = plan_choices.measure_arms(tmp_path / "run")
    assert [row[:3] for row in measured] == [
        [name, "1", "0.0"] for name in ("before-test", "gkd-0.0001", "seqkd-0.0001")
    ]


def test_the_page_describes_the_search_of_its_task() -> None:
    """Of the tasks, only `own` reads BENCHMARK."""
    settings = Settings("sums", benchmark="gsm8k")
    rows = [Row(name, {}, {}) for name in ("before", "gkd")]
    text = page.format_page(settings, find_task(settings).conditions, rows, {}, Plan({}, 0.0, 1))
    assert "is the best of 4 by the mean of greedy and sampled accuracy, then by divergence" in text
    assert "Greedy accuracy, sampled accuracy and KL on the validation prompts" in text
    assert "1000 other prompts test. The seeds" in " ".join(text.split())
    settings = Settings("embedded")
    text = page.format_page(settings, find_task(settings).conditions, rows, {}, Plan({}, 0.0, 1))
    assert "1800 other prompts test, and 450 of them sampled accuracy." in " ".join(text.split())


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, {"task": "sums", "scale": "full", "seeds": "1 2 3 4", "hours": "12", "methods": ""}),
        ({"TASK": "plans", "METHODS": "tip mine.py"}, {"task": "plans", "methods": " tip {directory}/mine.py"}),
        ({"PROMPTS": "mine.py", "ENGINE": "vllm"}, {"task": "own", "prompts": "{directory}/mine.py", "engine": "vllm"}),
        ({"SCALE": "tiny"}, {"scale": "tiny", "seeds": "1 2"}),
    ],
)
def test_the_recipe_hands_its_variables_over(
    variables: dict[str, str], expected: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "mine.py").touch()
    (tmp_path / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "python").chmod(0o755)
    words = finish(start("bench", tmp_path, **variables)).splitlines()
    assert words[:2] == ["-m", "recipes.bench.run"]
    handed = {name: words[words.index(f"--{name}") + 1] for name in expected}
    assert handed == {name: value.format(directory=tmp_path) for name, value in expected.items()}
    assert "--plan-only" not in words
    assert finish(start("bench", tmp_path, **variables, DRY_RUN=1)).splitlines()[-1] == "--plan-only"


@pytest.mark.parametrize("number", [1, 2])
def test_workers_call_with_all_arguments_and_stop_after_an_error(number: int, tmp_path: Path) -> None:
    with open_workers(number) as workers:
        workers.each("writes", Path.write_text, [(tmp_path / name, name) for name in "ab"])
    assert sorted(file.read_text() for file in tmp_path.iterdir()) == ["a", "b"]
    with pytest.raises(ValueError, match="domain"), open_workers(number) as workers:
        workers.each("roots", math.sqrt, [(-1,)])


def write_later(file: Path) -> None:
    time.sleep(2)
    file.touch()


def test_workers_end_at_once_when_they_are_interrupted(tmp_path: Path) -> None:
    def interrupted() -> None:
        with open_workers(2) as workers:
            workers.pool.submit(write_later, tmp_path / "late")
            workers.pool.submit(print).result()  # both workers run
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not list(tmp_path.iterdir())


def test_no_arm_runs_when_the_plan_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    for name in ("prepare", "prepare_seed", "run_arm"):
        monkeypatch.setattr(arms, name, lambda *arguments: called.append(arguments[-1]))
    monkeypatch.setattr(arms, "probe", lambda *_: {"step": 1.0, "other": 1.0})
    monkeypatch.setattr("recipes.bench.run.make_plan", lambda *_: Plan({GKD.name: 13 * 3600.0}, 0.0, 1))
    bench = Bench(tmp_path, Settings("sums"), choose_entries(GKD.name), workers=1)
    with pytest.raises(InputError, match=r"13\.0 hours"):
        bench.run(12, plan_only=False)
    assert called[1:] == [0, Arm(0, "validation"), Arm(0, "test")]
    bench.run(14, plan_only=True)
    assert not [arm for arm in called if isinstance(arm, Arm) and arm.entry]


def test_the_arms_of_a_seed_run_in_an_order_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("prepare", "prepare_seed", "run_arm"):
        monkeypatch.setattr(arms, name, lambda *_: None)
    monkeypatch.setattr(arms, "probe", lambda *_: {"step": 1.0, "other": 1.0})
    run: dict[str, list[Arm]] = {}
    monkeypatch.setattr(arms, "run_arms", lambda workers, title, settings, root, chosen: run.update({title: chosen}))
    monkeypatch.setattr("recipes.bench.run.make_plan", lambda *_: Plan({}, 0.0, 1))
    monkeypatch.setattr("recipes.bench.run.choose_rate", lambda found, root: found[0].rate)
    monkeypatch.setattr(page, "write", lambda *_: None)
    Bench(tmp_path, Settings("sums"), choose_entries(""), workers=1).run(12, plan_only=False)
    orders = {tuple(arm.directory.name for arm in run[f"seed {seed}"]) for seed in (1, 2, 3, 4)}
    assert len(orders) == 4
    assert len({frozenset(order) for order in orders}) == 1
