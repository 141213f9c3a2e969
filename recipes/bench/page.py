"""Writes the page of a bench, its figure and its rows from the results; no number is typed."""

import json
from collections.abc import Mapping
from pathlib import Path

from recipes.bench.figure import draw_differences
from recipes.bench.plan import Plan
from recipes.experiment.arms import Arm, result_row
from recipes.experiment.conditions import Conditions
from recipes.experiment.entries import GKD, Entry
from recipes.experiment.measures import RESULT, ROWS
from recipes.experiment.settings import SEARCH_SEED, SETTINGS_FILE, Settings
from recipes.experiment.statistics import Runs
from recipes.experiment.tables import EXPLANATION, MEANINGLESS, Row, format_lines, format_table

PAGE, FIGURE = "bench.md", "differences.svg"


def write(root: Path, settings: Settings, conditions: Conditions, chosen: Mapping[Entry, float], plan: Plan) -> None:
    """Write `PAGE`, `ROWS` and `FIGURE` from all complete arms; chosen: the learning rate of each method."""
    grid = conditions.rates(settings.factors)
    search = {entry: [_read(root, search_arm(entry, rate)) for rate in grid] for entry in chosen}
    before = _read_runs(root, settings, None, 0.0)
    runs = {entry.name: _read_runs(root, settings, entry, rate) for entry, rate in chosen.items()}
    ends = {min(grid), max(grid)} if len(grid) > 1 else set()
    rates = {entry.name: f"{rate:g}{'*' * (rate in ends)}" for entry, rate in chosen.items()}
    rows = [Row("before", before, before)]
    rows += [Row(name, found, runs[GKD.name], rates[name]) for name, found in runs.items()]
    draw_differences(rows[1:], root / FIGURE)
    lines = [*read_rows(root, settings, conditions, chosen)]
    (root / ROWS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (root / PAGE).write_text(format_page(settings, conditions, rows, search, plan))


def search_arm(entry: Entry, rate: float) -> Arm:
    return Arm(SEARCH_SEED, "validation", entry, rate)


def read_rows(
    root: Path, settings: Settings, conditions: Conditions, chosen: Mapping[Entry, float]
) -> list[dict[str, object]]:
    """A row per complete arm: of the search, of the students before training, and of the test."""
    found = [search_arm(entry, rate) for entry in chosen for rate in conditions.rates(settings.factors)]
    found += [Arm(seed, "test") for seed in settings.seeds]
    found += [Arm(seed, "test", entry, rate) for entry, rate in chosen.items() for seed in settings.seeds]
    return [result_row(settings.task, arm, result) for arm in found if (result := _read(root, arm))]


def format_page(
    settings: Settings,
    conditions: Conditions,
    rows: list[Row],
    search: Mapping[Entry, list[dict[str, float]]],
    plan: Plan,
) -> str:
    """The page in Markdown; search: the results of each method at each learning rate of the grid."""
    sizes, grid = conditions.sizes, conditions.rates(settings.factors)
    criterion = "divergence" if conditions.benchmark else "the mean of greedy and sampled accuracy, then by divergence,"
    note = "" if settings.scale == "full" else f"{MEANINGLESS}\n\n"
    others = "a seed" if conditions.benchmark else "a student and a seed"
    sampled = f", and {sizes.sampled} of them sampled accuracy" if sizes.sampled else ""
    test = "The test is the benchmark." if conditions.benchmark else f"{sizes.test} other prompts test{sampled}."
    return f"""# Bench: {settings.task}

{note}All methods have the same student, prompts, order and number of responses: {sizes.train} prompts, each once, with
one response of up to {conditions.response_tokens} tokens, in {conditions.steps} steps of {conditions.batch}. The
learning rate of each method is the best of {len(grid)} by {criterion} on {sizes.validation} validation prompts, with
{others} that the test does not use; * marks a rate at an end of the grid. {test} The seeds
are {", ".join(map(str, settings.seeds))}. The plan was {plan.hours:.1f} hours with {plan.workers} workers.
`{SETTINGS_FILE}` holds the task's settings, `{ROWS}` every measurement.

{format_table(rows)}

{EXPLANATION}
KL and entropy use the responses to {sizes.held_out} of the test prompts. The reference is GKD, and Holm's
correction counts the {len(rows) - 2} other methods.

![Differences to GKD with 95 % intervals]({FIGURE})

## The search

{"KL" if conditions.benchmark else "Greedy accuracy, sampled accuracy and KL"} on the validation prompts with each
learning rate. The last column lists the options that the bench sets for a method.

{_format_search(grid, search)}
"""


def _format_search(grid: list[float], search: Mapping[Entry, list[dict[str, float]]]) -> str:
    lines = [["", *(f"{rate:g}" for rate in grid), "options"]]
    lines += [
        [entry.name, *map(_format_result, found), f"`{entry.options}`" if entry.options else ""]
        for entry, found in search.items()
    ]
    return format_lines(lines)


def _format_result(result: dict[str, float]) -> str:
    if "kl" not in result:
        return "not finite" if result else ""
    accuracies = [f"{100 * result[name]:.1f} %" for name in ("accuracy", "sampled_accuracy") if name in result]
    return ", ".join([*accuracies, f"{result['kl']:.4f}"])


def _read_runs(root: Path, settings: Settings, entry: Entry | None, rate: float) -> Runs:
    found = {seed: _read(root, Arm(seed, "test", entry, rate)) for seed in settings.seeds}
    return {seed: result for seed, result in found.items() if result}


def _read(root: Path, arm: Arm) -> dict[str, float]:
    file = root / arm.directory / RESULT
    return json.loads(file.read_text()) if file.is_file() else {}
