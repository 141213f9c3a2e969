"""report: run directories -> one HTML page. Reads complete and partial artifacts, and writes only the page."""

from collections.abc import Mapping, Sequence
from math import nan
from pathlib import Path
from typing import Any

from tsdkd.artifacts.disk import replace_text, translate_disk_errors
from tsdkd.artifacts.locks import reading_inputs
from tsdkd.errors import InputError
from tsdkd.stages.pages.charts import Z_95, Chart, Series, dot_chart
from tsdkd.stages.pages.page import render
from tsdkd.stages.report import commands, costs, curves, descriptions, groups, notes, responses
from tsdkd.stages.report.runs import Run, RunArtifact, load_runs
from tsdkd.stages.results.compare import Comparison, Score, compare
from tsdkd.stages.results.model_names import shorten_paths
from tsdkd.stages.results.paired import Difference
from tsdkd.stages.results.tables import MAIN_METHODS, benchmark_tables, held_out_tables, truncation_notes


@reading_inputs()
def report(directories: Sequence[Path], html: Path | None = None) -> Path:
    """Write a page about the runs in these directories. Returns its path.

    html: None writes into the directory of a single run, or beside the first of several.

    Raises InputError for directories without an artifact, or if `html` is a directory.
    """
    runs = load_runs(directories)
    target = html or (directories[0] if len(directories) == 1 else directories[0].parent) / "report.html"
    if target.is_dir():
        raise InputError(f"{target} is a directory.", "Name a file with --html.")
    logs = curves.load_logs(runs)
    comparison, comparison_warnings = _compare_results(runs)
    page = render(
        "report.html",
        runs=[_run_values(run) for run in runs],
        differences=descriptions.differences_between(runs),
        benchmark_tables=benchmark_tables(comparison, MAIN_METHODS) if comparison else [],
        held_out_tables=held_out_tables(comparison) if comparison else [],
        interval_charts=_interval_charts(comparison) if comparison else [],
        held_out_responses=_held_out_responses(comparison) if comparison else {},
        has_log=bool(logs),
        has_held_out=any(artifact.manifest.config.get("held_out") for run in runs for artifact in run.trained),
        held_out_charts=curves.draw_charts([*curves.HELD_OUT_CHARTS, *curves.charts_by_teacher(logs)], logs),
        term_charts=curves.draw_charts([*curves.TERM_CHARTS, *curves.charts_of_own_terms(logs)], logs),
        health_charts=curves.draw_charts(curves.HEALTH_CHARTS, logs),
        rollout_comparisons=responses.compare_rollouts(runs),
        warnings=[*comparison_warnings, *notes.degeneration_signs(logs)],
        cost_columns=costs.COST_COLUMNS,
        lineage_columns=notes.LINEAGE_COLUMNS,
    )
    with translate_disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        replace_text(target, page)
    return target


def _run_values(run: Run) -> dict[str, Any]:
    """The template's values for one run."""
    return {
        "name": run.name,
        "descriptions": descriptions.describe_artifacts(run),
        "group_tables": groups.group_tables(run),
        "differences_to_paper": descriptions.differences_to_paper(run),
        "settings": descriptions.all_settings(run),
        "missing": notes.missing_artifacts(run),
        "provenance": notes.provenance_notes(run),
        "warnings": notes.run_warnings(run),
        "lineage": notes.lineage_rows(run),
        "costs": costs.cost_rows(run),
        "cost_notes": costs.cost_notes(run),
        "comparisons": responses.compare_before_and_after(run),
        "recorded_commands": commands.recorded_commands(run),
        "rebuilt_commands": commands.rebuild_commands(run),
    }


def _compare_results(runs: list[Run]) -> tuple[Comparison | None, list[str]]:
    """Compare all complete results, and return warnings; results that runs share are compared once."""
    distinct: dict[str, RunArtifact] = {}
    for artifact in (artifact for run in runs for artifact in run.of_kind("results") if artifact.readable):
        distinct.setdefault(artifact.manifest.fingerprint, artifact)
    if not distinct:
        return None, []
    names = shorten_paths([artifact.path for artifact in distinct.values()])
    artifacts = dict(zip(names, distinct.values(), strict=True))
    baseline = next((name for name, artifact in artifacts.items() if artifact.path.name == "student"), None)
    comparison = compare(
        {name: artifact.as_artifact() for name, artifact in artifacts.items()}, baseline, skip_unpaired=True
    )
    return comparison, [
        *(f"Results are not compared: {reason}" for reason in comparison.skipped),
        *comparison.notes,
        *truncation_notes(comparison),
    ]


def _interval_charts(comparison: Comparison) -> list[Chart]:
    if not comparison.benchmarks:
        return []
    scores: dict[str, Mapping[str, Score | Difference]] = dict(comparison.scores)
    scores |= {f"paper: {name}": comparison.published[name] for name in MAIN_METHODS if name in comparison.published}
    charts = [_interval_chart("Accuracy with 95 % intervals", "%", comparison.benchmarks, scores)]
    if any(comparison.differences.values()):
        title = f"Difference to {comparison.baseline} with 95 % intervals"
        charts.append(_interval_chart(title, "points", comparison.benchmarks, comparison.differences, zero_line=True))
    return charts


def _interval_chart(
    title: str,
    unit: str,
    benchmarks: tuple[str, ...],
    scores_by_model: Mapping[str, Mapping[str, Score | Difference]],
    *,
    zero_line: bool = False,
) -> Chart:
    series = []
    for model, scores in scores_by_model.items():
        rows = [row for row, benchmark in enumerate(benchmarks) if benchmark in scores]
        known = [scores[benchmarks[row]] for row in rows]
        means = [100 * score.value for score in known]
        errors = [nan if score.stderr is None else 100 * Z_95 * score.stderr for score in known]
        low = [mean - error for mean, error in zip(means, errors, strict=True)]
        high = [mean + error for mean, error in zip(means, errors, strict=True)]
        series.append(Series(model, rows, means, low, high))
    return dot_chart(title, unit, benchmarks, series, zero_line=zero_line)


def _held_out_responses(comparison: Comparison) -> dict[str, list[tuple[str, str]]]:
    """By held-out prompt: each model and its response."""
    by_prompt: dict[str, list[tuple[str, str]]] = {}
    for model, held_out in comparison.held_out.items():
        by_prompt.setdefault(held_out["prompt"], []).append((model, held_out["response"]))
    return by_prompt
