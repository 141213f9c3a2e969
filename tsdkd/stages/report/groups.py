"""A run's responses by teacher, with what its scores and its training measured of each, and by source."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow.compute as pc

from tsdkd.stages.data.rollout_lengths import trained_lengths
from tsdkd.stages.metrics.names import METRICS
from tsdkd.stages.report.curves import DIVERGENCE
from tsdkd.stages.report.descriptions import base_name
from tsdkd.stages.report.runs import Run, RunArtifact
from tsdkd.stages.results.tables import Table

SCORE_COLUMNS = ("student_entropy", "teacher_entropy", "divergence")
"""Means per token that scores record for each teacher; the divergence with lossy signals alone."""


@dataclass(slots=True)
class Group:
    """Counts of the responses that have one source or one teacher."""

    responses: int = 0
    tokens: int = 0
    """Those that are learned."""
    truncated: int = 0

    def cells(self) -> list[str]:
        mean, truncated = self.tokens / self.responses, self.truncated / self.responses
        return [f"{self.responses:,}", f"{self.tokens:,}", f"{mean:,.1f}", f"{truncated:.1%}"]


GROUP_COLUMNS = ["responses", "tokens", "mean length", "truncated"]


def group_tables(run: Run) -> list[Table]:
    """A table by teacher for rollouts or scores of named teachers, and one by source for rollouts of several."""
    rollouts, scores = (run.named(name) for name in ("rollouts", "scores"))
    if rollouts is None or not rollouts.readable:
        return []
    recorded = rollouts.manifest.config.get("teacher_by")
    column = "teacher" if recorded else "source" if scores and "" not in scores.manifest.teachers else None
    tables = []
    if column:
        tables.append(_teacher_table(run, _read_groups(rollouts, column), scores))
    if (recorded or column) != "source" and _has_several(rollouts, "source"):
        rows = [[name, *group.cells()] for name, group in sorted(_read_groups(rollouts, "source").items())]
        tables.append(("Responses by source", ["source", *GROUP_COLUMNS], rows))
    return tables


def _teacher_table(run: Run, groups: Mapping[str, Group], scores: RunArtifact | None) -> Table:
    """Empty columns are left out."""
    models = dict[str, str]()
    for artifact in run.artifacts:
        models |= {name: base_name(record.name) for name, record in artifact.manifest.teachers.items()}
    measured = _by_teacher(scores)
    columns = [*SCORE_COLUMNS, *(artifact.name for artifact in run.trained)]
    cells = {
        name: [
            *(_number(measured.get(name, {}).get(key)) for key in SCORE_COLUMNS),
            *(_first_to_best(_by_teacher(artifact).get(name, {})) for artifact in run.trained),
        ]
        for name in groups
    }
    filled = [i for i in range(len(columns)) if any(row[i] for row in cells.values())]
    labels = [_label(columns[i], many=len(run.trained) > 1) for i in filled]
    rows = [
        [name, models.get(name, ""), *groups[name].cells(), *(cells[name][i] for i in filled)]
        for name in sorted(groups)
    ]
    return "Responses by teacher", ["teacher", "model", *GROUP_COLUMNS, *labels], rows


def _label(column: str, *, many: bool) -> str:
    if column in SCORE_COLUMNS:
        return column.replace("_", " ")
    return f"{METRICS[DIVERGENCE].label}, first \u2192 best{f' ({column})' if many else ''}"


def _by_teacher(artifact: RunArtifact | None) -> Mapping[str, Mapping[str, float]]:
    """What a summary holds of each teacher, by name."""
    teachers: dict[str, dict[str, float]] = artifact.manifest.summary.get("teachers", {}) if artifact else {}
    return teachers


def _first_to_best(measured: Mapping[str, float]) -> str:
    first, last = measured.get(f"{DIVERGENCE}_first"), measured.get("best_kl", measured.get(f"{DIVERGENCE}_last"))
    return "" if first is None or last is None else f"{first:.4f} \u2192 {last:.4f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _has_several(rollouts: RunArtifact, column: str) -> bool:
    artifact, values = rollouts.as_artifact(), set[Any]()
    for part in artifact.tables:
        values.update(artifact.read_part(part, [column])[column].unique().to_pylist())
    return len(values) > 1


def _read_groups(rollouts: RunArtifact, column: str) -> dict[str, Group]:
    """The responses by the value of a column, part by part."""
    artifact, groups = rollouts.as_artifact(), defaultdict[str, Group](Group)
    for part in artifact.tables:
        table = artifact.read_part(part, ["response_ids", "response_mask", "finish_reason", column])
        truncated = pc.equal(table["finish_reason"], "length").to_pylist()
        for name, tokens, is_truncated in zip(
            table[column].to_pylist(), trained_lengths(table), truncated, strict=True
        ):
            group = groups[name]
            group.responses += 1
            group.tokens += tokens
            group.truncated += is_truncated
    return dict(groups)
