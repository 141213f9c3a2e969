"""Charts of the training log: one chart per metric or unit, one curve per run, thinned to fit a page."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

from tsdkd.stages.metrics.names import (
    GRAD_SHARE_METRICS,
    METRICS,
    SELECTED,
    TERM_METRICS,
    metric,
    metric_teacher,
    own_terms,
    teacher_metric,
)
from tsdkd.stages.pages.charts import Chart, Series, line_chart
from tsdkd.stages.report.runs import Run

MAX_POINTS = 1200
"""Of all curves in a chart; each curve keeps at least `MIN_CURVE_POINTS`."""
MIN_CURVE_POINTS = 60
DIVERGENCE = "eval_kl"
"""The log key of the divergence on held-out prompts, which is also measured for each of several teachers."""
LogEntry = dict[str, float]


@dataclass(frozen=True, slots=True)
class MetricChart:
    """Metrics of one unit in one chart."""

    title: str
    unit: str
    metrics: dict[str, str] = field(default_factory=dict)
    """The curve's label of each log key; empty if the chart has a single metric."""


def _chart(*metrics: str, title: str = "") -> MetricChart:
    """A chart of one metric, or of several metrics with one unit."""
    label, unit = metric(metrics[0]).label, metric(metrics[0]).unit
    labels = {name: metric(name).label if len(metrics) > 1 else "" for name in metrics}
    return MetricChart(title or label[0].upper() + label[1:], unit, labels)


TERM_CHARTS = tuple(map(_chart, TERM_METRICS))
HEALTH_CHARTS = (
    _chart("student_entropy", "teacher_entropy", title="Mean entropy"),
    *map(_chart, ("top1_agreement", "rank_agreement")),
    _chart("student_outside_mass", "teacher_outside_mass", title="Mass outside the candidates"),
    *map(_chart, ("candidate_overlap", "drift", "rollout_age", "gate")),
    _chart("response_length", "opener_length", title="Length"),
    _chart("truncated", "repeating", title="Truncated and repeating responses"),
    _chart(*GRAD_SHARE_METRICS, title="Shares of the gradient"),
    *map(_chart, ("grad_norm", "learning_rate")),
)
HELD_OUT_CHARTS = tuple(_chart(name) for name in METRICS if name.startswith("eval_"))


def load_logs(runs: list[Run]) -> dict[str, list[LogEntry]]:
    """The log of each trained checkpoint that has one, by the shortest distinct name."""
    logs = {}
    for run in runs:
        for artifact in run.trained:
            run_name = run.name if len(runs) > 1 else ""
            artifact_name = artifact.name if len(run.trained) > 1 or not run_name else ""
            logs[f"{run_name} {artifact_name}".strip()] = artifact.log
    return {name: log for name, log in logs.items() if log}


def charts_by_teacher(logs: dict[str, list[LogEntry]]) -> list[MetricChart]:
    """A chart of the divergence on held-out prompts with a curve for each of several teachers."""
    keys = dict.fromkeys(key for log in logs.values() for entry in log for key in entry)
    labels = {key: metric_teacher(key) for key in keys if key.startswith(teacher_metric(DIVERGENCE, ""))}
    shown = METRICS[DIVERGENCE]
    return [MetricChart(f"{shown.label[0].upper()}{shown.label[1:]} by teacher", shown.unit, labels)] if labels else []


def charts_of_own_terms(logs: dict[str, list[LogEntry]]) -> list[MetricChart]:
    """Charts of the losses of methods with losses of their own, and of the tokens that have a weight in them."""
    own = sorted({term for log in logs.values() for entry in log for term in own_terms(entry)})
    charts = [_chart(term) for term in own if term not in TERM_METRICS]
    return charts + ([_chart(*(f"{term}{SELECTED}" for term in own), title="Selected tokens")] if own else [])


def draw_charts(charts: Iterable[MetricChart], logs: dict[str, list[LogEntry]]) -> list[Chart]:
    """The charts of the metrics that a log has."""
    max_points = max(MIN_CURVE_POINTS, MAX_POINTS // max(1, len(logs)))
    logged = {key for log in logs.values() for entry in log for key in entry}
    drawn = []
    for chart in charts:
        if logged & chart.metrics.keys():
            # A run without values keeps an empty curve, so that every run has one colour in all charts.
            curves = [thin(name, log, key, max_points) for name, log, key in _curves(chart, logs) if key in logged]
            drawn.append(line_chart(chart.title, "step", chart.unit, curves, _describe(chart, logs)))
    return drawn


def thin(name: str, log: list[LogEntry], key: str, max_points: int) -> Series:
    """One point per step; of more than `max_points`, means of neighbours with their range, at their last step."""
    steps = [entry["step"] for entry in log if key in entry]
    values = [entry[key] for entry in log if key in entry]
    if len(values) <= max_points:
        return Series(name, steps, values)
    edges = [len(values) * i // max_points for i in range(max_points + 1)]
    groups = [values[start:end] for start, end in pairwise(edges)]
    return Series(
        name,
        [steps[edge - 1] for edge in edges[1:]],
        [sum(group) / len(group) for group in groups],
        [min(group) for group in groups],
        [max(group) for group in groups],
    )


def _curves(chart: MetricChart, logs: dict[str, list[LogEntry]]) -> Iterator[tuple[str, list[LogEntry], str]]:
    """Name, log and key of each curve."""
    for name, log in logs.items():
        for key, label in chart.metrics.items():
            curve_name = (label or name) if len(logs) == 1 else f"{name} {label}".strip()
            yield curve_name, log, key


def _describe(chart: MetricChart, logs: dict[str, list[LogEntry]]) -> str:
    """First, last, lowest and highest value of each curve."""
    descriptions = []
    for name, log, key in _curves(chart, logs):
        if values := [entry[key] for entry in log if key in entry]:
            prefix = f"{name}: " if len(logs) > 1 or len(chart.metrics) > 1 else ""
            range_ = f"between {min(values):.4g} and {max(values):.4g}"
            descriptions.append(f"{prefix}from {values[0]:.4g} to {values[-1]:.4g}, {range_}")
    return "; ".join(descriptions) + "."
