"""The page of a bench with its table, and its rows: written from the results of the arms; no number is typed."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from recipes.bench.plan import Plan
from recipes.experiment.arms import Arm
from recipes.experiment.entries import GKD, Entry
from recipes.experiment.measures import RESULT
from recipes.experiment.settings import SEARCH_SEED, SETTINGS_FILE, Settings
from recipes.experiment.statistics import Runs
from recipes.experiment.tables import EXPLANATION, Row, format_table
from recipes.experiment.tasks import Conditions

PAGE, ROWS = "bench.md", "results.jsonl"


def write(root: Path, settings: Settings, conditions: Conditions, chosen: Mapping[Entry, float], plan: Plan) -> None:
    """Write `PAGE` and `ROWS` from all complete arms of the chosen methods."""
    (root / ROWS).write_text("".join(json.dumps(row) + "\n" for row in read_rows(root, settings, conditions, chosen)))
    runs_by_name = {entry.name: _read_runs(root, settings, entry, rate) for entry, rate in chosen.items()}
    rates = {entry.name: rate for entry, rate in chosen.items()}
    before = _read_runs(root, settings, None, 0.0)
    (root / PAGE).write_text(format_page(settings, conditions, rates, before, runs_by_name, plan))


def read_rows(
    root: Path, settings: Settings, conditions: Conditions, chosen: Mapping[Entry, float]
) -> list[dict[str, object]]:
    """A row per complete arm: of the search, of the students before training, and of the test."""
    seeds, rates = settings.seeds, conditions.rates(settings.factors)
    found = [Arm(SEARCH_SEED, "validation", entry, rate) for entry in chosen for rate in rates]
    found += [Arm(seed, "test") for seed in seeds]
    found += [Arm(seed, "test", entry, rate) for entry, rate in chosen.items() for seed in seeds]
    return [
        {
            "task": settings.task,
            "method": arm.entry.name if arm.entry else "before",
            "rate": arm.rate,
            "seed": arm.seed,
            "split": arm.split,
            **result,
        }
        for arm in found
        if (result := _read_result(root, arm))
    ]


def format_page(
    settings: Settings,
    conditions: Conditions,
    rates: Mapping[str, float],
    before: Runs,
    runs_by_name: Mapping[str, Runs],
    plan: Plan,
) -> str:
    """The page in Markdown."""
    sizes, grid = conditions.sizes, conditions.rates(settings.factors)
    criterion = "divergence from the teacher" if settings.benchmark else "accuracy"
    return f"""# Bench: {settings.task}

All methods have the same student, prompts, order and budget: {sizes.train} prompts, each once, with one response of up
to {conditions.response_tokens} tokens, {conditions.steps} steps of {conditions.batch}. The learning rate of each method
is the best of {", ".join(f"{rate:g}" for rate in grid)} by {criterion} on {sizes.validation} validation prompts, with
a student and a seed that the test does not use; * marks an end of the grid. The test has other prompts, and seeds
{", ".join(map(str, settings.seeds))}. The plan was {plan.hours:.1f} hours with {plan.workers} workers.
`{SETTINGS_FILE}` holds the settings, `{ROWS}` every measurement.

{format_rows(rates, grid, before, runs_by_name)}

{EXPLANATION}
KL and entropy are measured on the responses to {sizes.held_out} of the test prompts. Differences are to GKD, and p has
Holm's correction over the {len(runs_by_name) - 1} other methods.
"""


def format_rows(
    rates: Mapping[str, float], grid: Sequence[float], before: Runs, runs_by_name: Mapping[str, Runs]
) -> str:
    """The table in Markdown: the students before training, and each method with its tests against the reference."""
    reference = runs_by_name[GKD.name]
    rows = [Row(name, runs, reference, _format_rate(rates[name], grid)) for name, runs in runs_by_name.items()]
    return format_table([Row("before", before, before), *rows])


def _format_rate(rate: float, grid: Sequence[float]) -> str:
    return f"{rate:g}{'*' * (len(grid) > 1 and rate in {min(grid), max(grid)})}"


def _read_runs(root: Path, settings: Settings, entry: Entry | None, rate: float) -> Runs:
    found = {seed: _read_result(root, Arm(seed, "test", entry, rate)) for seed in settings.seeds}
    return {seed: result for seed, result in found.items() if result}


def _read_result(root: Path, arm: Arm) -> dict[str, float]:
    file = root / arm.directory / RESULT
    return json.loads(file.read_text()) if file.is_file() else {}
