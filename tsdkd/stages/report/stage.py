"""report: run directories -> one HTML page. Reads what is there, says what is not, and writes nothing else."""

from collections.abc import Mapping, Sequence
from math import nan
from pathlib import Path
from typing import Any

from tsdkd.errors import InputError
from tsdkd.stages.pages.charts import Chart, Series, dots
from tsdkd.stages.pages.page import render
from tsdkd.stages.report import commands, costs, curves, descriptions, notes, samples
from tsdkd.stages.report.runs import Run, RunArtifact, find_runs
from tsdkd.stages.results.compare import Comparison, Difference, Score, compare, shorten_paths
from tsdkd.stages.results.tables import MAIN_METHODS, benchmark_tables, held_out_tables, truncation_notes

ERRORS_95 = 1.96
"""Standard errors on each side of a 95 % interval."""


def report(places: Sequence[Path], html: Path | None = None) -> Path:
    """Write a page about these runs to `html`; None: into a single one's directory, or beside the first of several.

    Raises InputError where there is no artifact, or where `html` is a directory.
    """
    runs = find_runs(places)
    target = html or (places[0] if len(places) == 1 else places[0].parent) / "report.html"
    if target.is_dir():
        raise InputError(f"{target} is a directory.", "Name a file with --html.")
    logs = curves.logs(runs)
    comparison, doubt = _compared(runs)
    page = render(
        "report.html",
        runs=[_of_run(run) for run in runs],
        differences=descriptions.differences(runs),
        benchmarks=benchmark_tables(comparison, MAIN_METHODS) if comparison else [],
        closeness=held_out_tables(comparison) if comparison else [],
        intervals=_intervals(comparison) if comparison else [],
        answers=_answers(comparison) if comparison else {},
        logged=bool(logs),
        holds_out=any(piece.manifest.config.get("held_out") for run in runs for piece in run.trained),
        held_out=curves.charts(curves.HELD_OUT, logs),
        training=curves.charts(curves.TRAINING, logs),
        health=curves.charts(curves.HEALTH, logs),
        shared=samples.of_runs(runs),
        warnings=[*doubt, *notes.degenerations(logs)],
        cost_columns=costs.COLUMNS,
        lineage_columns=notes.LINEAGE,
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.tmp")
    aside.write_text(page, encoding="utf-8")
    aside.replace(target)
    return target


def _of_run(run: Run) -> dict[str, Any]:
    """What the page says of each run by itself."""
    return {
        "name": run.name,
        "told": descriptions.sentences(run),
        "departures": descriptions.departures(run),
        "settings": descriptions.settings(run),
        "missing": notes.missing(run),
        "warnings": notes.warnings(run),
        "lineage": notes.lineage(run),
        "costs": costs.rows(run),
        "cost_notes": costs.notes(run),
        "samples": samples.before_and_after(run),
        "typed": commands.typed(run),
        "rebuilt": commands.rebuilt(run),
    }


def _compared(runs: list[Run]) -> tuple[Comparison | None, list[str]]:
    """All finished results, each once (runs may share a teacher's), and what stands in the way."""
    kept: dict[str, RunArtifact] = {}
    for piece in (piece for run in runs for piece in run.of("results") if piece.readable):
        kept.setdefault(piece.artifact.fingerprint, piece)
    pieces = list(kept.values())
    if not pieces:
        return None, []
    names = shorten_paths([piece.path for piece in pieces])
    baseline = next((name for name, piece in zip(names, pieces, strict=True) if piece.path.name == "student"), None)
    found = compare(
        {name: piece.artifact for name, piece in zip(names, pieces, strict=True)}, baseline, skip_unpaired=True
    )
    return found, [
        *(f"Results are not compared: {why}" for why in found.skipped),
        *found.notes,
        *truncation_notes(found),
    ]


def _intervals(comparison: Comparison) -> list[Chart]:
    scores: dict[str, Mapping[str, Score | Difference]] = dict(comparison.scores)
    scores |= {f"paper: {one}": comparison.published[one] for one in MAIN_METHODS if one in comparison.published}
    charts = [_chart("Accuracy with 95 % intervals", "%", comparison.benchmarks, scores)]
    if any(comparison.differences.values()):
        title = f"Difference to {comparison.baseline}, with 95 % intervals"
        charts.append(_chart(title, "points", comparison.benchmarks, comparison.differences, zero=True))
    return charts if comparison.benchmarks else []


def _chart(
    title: str,
    unit: str,
    names: tuple[str, ...],
    rows: Mapping[str, Mapping[str, Score | Difference]],
    *,
    zero: bool = False,
) -> Chart:
    series = []
    for name, found in rows.items():
        known = [(number, found[one]) for number, one in enumerate(names) if one in found]
        means = [100 * score.value for _, score in known]
        reach = [nan if score.stderr is None else 100 * ERRORS_95 * score.stderr for _, score in known]
        low = [mean - error for mean, error in zip(means, reach, strict=True)]
        high = [mean + error for mean, error in zip(means, reach, strict=True)]
        series.append(Series(name, [number for number, _ in known], means, low, high))
    return dots(title, unit, names, series, zero=zero)


def _answers(comparison: Comparison) -> dict[str, list[tuple[str, str]]]:
    """By held-out prompt: each model's answer."""
    found: dict[str, list[tuple[str, str]]] = {}
    for name, near in comparison.held_out.items():
        found.setdefault(near["prompt"], []).append((name, near["response"]))
    return found
