"""The page of a bench with its table, and its rows: written from the results of the arms; no number is typed."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from recipes.bench.arms import Arm
from recipes.bench.methods import REFERENCE, Entry
from recipes.bench.plan import Plan
from recipes.bench.settings import SEARCH_SEED, SETTINGS_FILE, Settings
from recipes.bench.tasks import Conditions
from recipes.experiment.measures import RESULT
from recipes.experiment.statistics import Runs, format_interval, holm, paired_differences, paired_p

PAGE, ROWS = "bench.md", "results.jsonl"
MEASURES = {"accuracy": (100, 1), "kl": (1, 4)}
"""Those with a test: scale and digits."""
COLUMNS = (
    *(
        "",
        "learning rate",
        "seeds",
        "accuracy %",
        "difference, points",
        "p",
        "sampled accuracy %",
        "KL",
        "difference",
        "p",
    ),
    *("entropy", "tokens", "truncated", "degenerated", "s/step", "times GKD's"),
)


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

{format_table(rates, grid, before, runs_by_name)}

Intervals are 95 %, Student's t over seeds. Differences to GKD are paired by seed: same student, same prompts. p is
two-sided by the paired t-test, with Holm's correction over the {len(runs_by_name) - 1} methods. Accuracy is at
temperature 0, sampled accuracy at temperature 1. KL(teacher ‖ student) and entropy are nats per token of the teacher's
responses to {sizes.held_out} of the test prompts. Tokens are those learned from. Seconds per step are medians while all
workers ran.
"""


def format_table(
    rates: Mapping[str, float], grid: Sequence[float], before: Runs, runs_by_name: Mapping[str, Runs]
) -> str:
    """The table in Markdown: the students before training, and each method with its tests against the reference."""
    reference = runs_by_name[REFERENCE]
    others = {name: runs for name, runs in runs_by_name.items() if name != REFERENCE}
    corrected = {
        measure: holm({name: paired_p(_differences(runs, reference, measure)) for name, runs in others.items()})
        for measure in MEASURES
    }
    rows = [_row("before", "", before, reference, {})]
    for name, runs in runs_by_name.items():
        is_end = len(grid) > 1 and rates[name] in {min(grid), max(grid)}
        tests = {measure: p[name] for measure, p in corrected.items() if name in p}
        rows.append(_row(name, f"{rates[name]:g}{'*' * is_end}", runs, reference, tests))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (COLUMNS, ["---"] * len(COLUMNS), *rows))


def _row(name: str, rate: str, runs: Runs, reference: Runs, tests: Mapping[str, float]) -> list[str]:
    cells: dict[str, list[str]] = {}
    for measure, (scale, digits) in MEASURES.items():
        values = [scale * run[measure] for run in runs.values() if measure in run]
        differences = [scale * value for value in _differences(runs, reference, measure)]
        shown = f"{'+' * (fmean(differences) > 0)}{format_interval(differences, digits)}" if differences else ""
        cells[measure] = [
            format_interval(values, digits) if values else "",
            "" if runs is reference else shown,
            _format_p(tests[measure]) if measure in tests and len(differences) > 1 else "",
        ]
    sampled = [100 * run["sampled_accuracy"] for run in runs.values() if "sampled_accuracy" in run]
    trained = [run["degenerated"] for run in runs.values() if "degenerated" in run]
    seconds, of_reference = (
        [run["seconds_per_step"] for run in found.values() if "seconds_per_step" in run] for found in (runs, reference)
    )
    return [
        *(name, rate, str(len(runs)), *cells["accuracy"], format_interval(sampled) if sampled else "", *cells["kl"]),
        *(_mean(runs, "entropy", ".3f"), _mean(runs, "tokens", ".0f"), _mean(runs, "truncated", ".1%")),
        f"{sum(trained)} of {len(trained)}" if trained else "",
        _mean(runs, "seconds_per_step", ".3f"),
        f"{fmean(seconds) / fmean(of_reference):.2f}" if seconds and of_reference else "",
    ]


def _differences(runs: Runs, reference: Runs, measure: str) -> list[float]:
    """Paired differences; none where the task does not have the measure."""
    has = [{seed: run for seed, run in found.items() if measure in run} for found in (runs, reference)]
    return paired_differences(*has, measure)


def _mean(runs: Runs, measure: str, format_: str) -> str:
    known = [run[measure] for run in runs.values() if measure in run]
    return format(fmean(known), format_) if known else ""


def _format_p(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def _read_runs(root: Path, settings: Settings, entry: Entry | None, rate: float) -> Runs:
    found = {seed: _read_result(root, Arm(seed, "test", entry, rate)) for seed in settings.seeds}
    return {seed: result for seed, result in found.items() if result}


def _read_result(root: Path, arm: Arm) -> dict[str, float]:
    file = root / arm.directory / RESULT
    return json.loads(file.read_text()) if file.is_file() else {}
