"""Results side by side: means with standard errors, and paired differences on the documents that two models share.

Reads results artifacts and the paper's numbers; imports neither torch nor lm-eval.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from math import erfc, sqrt
from typing import Any

import numpy as np

from tsdkd.artifacts.reader import Artifact
from tsdkd.errors import InputError
from tsdkd.stages.results import published
from tsdkd.stages.results.benchmarks import BENCHMARKS
from tsdkd.stages.results.paired import Difference, paired_difference
from tsdkd.stages.results.published import AVERAGE

SETTINGS = (
    *("limit", "max_new_tokens", "temperature", "top_p", "samples"),
    *("max_length", "chat_template", "engine", "dtype", "day"),
)
"""Settings of an evaluation that change its means."""


@dataclass(frozen=True, slots=True)
class Score:
    """A mean in [0, 1]. The paper publishes no more than a value."""

    value: float
    stderr: float | None = None
    documents: int | None = None
    samples: int = 1
    """Responses per document; `value` is their mean, avg@samples."""
    pass_at: Mapping[int, "Score"] = field(default_factory=dict)
    """By k: the estimated fraction of documents of which one of k responses is right."""
    truncated: int = 0
    """Truncated responses."""
    prompts_truncated: int = 0
    stopped: int = 0
    """Responses that a stop string ended."""

    @property
    def responses(self) -> int:
        return (self.documents or 0) * self.samples


@dataclass(frozen=True, slots=True)
class Comparison:
    benchmarks: tuple[str, ...]
    """In the order of `BENCHMARKS`. The average follows two or more: over those that the paper's table reports, or
    over all. Variants of one benchmark count once."""
    baseline: str
    scores: dict[str, dict[str, Score]]
    """By model, then by benchmark."""
    differences: dict[str, dict[str, Difference]]
    published: dict[str, dict[str, Score]]
    """The paper's rows, by method, then by benchmark; benchmarks that the paper does not report have no key."""
    held_out: dict[str, dict[str, Any]]
    """Divergence from the teacher, by model."""
    notes: tuple[str, ...] = ()
    """Settings that differ between models, and notes on the paper's rows."""
    skipped: tuple[str, ...] = ()
    """Reasons for missing differences where two models share a benchmark."""


def choose_baseline(models: Collection[str], baseline: str | None) -> str:
    """The model that others are compared with: by default the student, else the first. Raises InputError."""
    baseline = baseline or ("student" if "student" in models else next(iter(models)))
    if baseline not in models:
        raise InputError(f"{baseline} has no results.", f"Choose from: {', '.join(models)}.")
    return baseline


def compare(
    artifacts: dict[str, Artifact],
    baseline: str | None = None,
    paper: str | None = None,
    *,
    skip_unpaired: bool = False,
) -> Comparison:
    """Compare results by model name.

    `baseline`: by default the student, or the first model without one; `paper`: a table of the paper, by default the
    one that matches the models' names.

    Raises InputError for an unknown baseline or table, and for two models that share a benchmark but no document of
    it. `skip_unpaired` skips such a difference instead and records the reason.
    """
    baseline = choose_baseline(artifacts, baseline)
    summaries = {name: artifact.manifest.summary for name, artifact in artifacts.items()}
    benchmarks = tuple(b for b in BENCHMARKS if any(b in summary for summary in summaries.values()))
    scores = {name: _scores(summary) for name, summary in summaries.items()}
    table = published.find_table(paper) if paper else published.matching_table(_model_names(artifacts))
    differences, skipped = _differences(artifacts, baseline, benchmarks, skip_unpaired)
    counted = _one_per_base(benchmarks, scores)
    notes = [note for name in artifacts if (note := _settings_note(artifacts, name, baseline))]
    notes += table.describe(counted) if table else []
    comparison = Comparison(
        benchmarks,
        baseline,
        scores,
        differences,
        _published_scores(table, benchmarks),
        {name: summary["held_out"] for name, summary in summaries.items() if "held_out" in summary},
        tuple(notes),
        tuple(skipped),
    )
    if len(counted) < 2:
        return comparison
    return _with_average(comparison, (table and table.common_benchmarks(counted)) or counted)


def _differences(
    artifacts: dict[str, Artifact], baseline: str, benchmarks: tuple[str, ...], skip_unpaired: bool
) -> tuple[dict[str, dict[str, Difference]], list[str]]:
    """The differences to the baseline by model, then by benchmark; and the reasons for missing ones."""
    rows: dict[str, dict[str, Difference]] = {name: {} for name in artifacts if name != baseline}
    skipped = []
    for name, row in rows.items():
        for benchmark in benchmarks:
            if any(benchmark not in artifacts[model].manifest.summary for model in (name, baseline)):
                continue
            try:
                row[benchmark] = _benchmark_difference(artifacts, name, baseline, benchmark)
            except InputError as error:
                if not skip_unpaired:
                    raise
                skipped.append(f"{error.cause} {error.remedy}")
    return rows, skipped


def _published_scores(
    table: published.PublishedTable | None, benchmarks: tuple[str, ...]
) -> dict[str, dict[str, Score]]:
    rows = table.accuracies(benchmarks) if table else {}
    return {method: {name: Score(value) for name, value in row.items()} for method, row in rows.items()}


def _with_average(comparison: Comparison, averaged: tuple[str, ...]) -> Comparison:
    """The comparison with the average over the benchmarks `averaged`."""

    def extended(rows: dict[str, dict[str, Score]]) -> dict[str, dict[str, Score]]:
        return {name: row | _average(row, averaged) for name, row in rows.items()}

    return replace(
        comparison,
        benchmarks=(*comparison.benchmarks, AVERAGE),
        scores=extended(comparison.scores),
        published=extended(comparison.published),
        differences={name: row | _average_difference(row, averaged) for name, row in comparison.differences.items()},
        notes=(*comparison.notes, *_variants_note(comparison.benchmarks, averaged)),
    )


def _one_per_base(benchmarks: tuple[str, ...], scores: dict[str, dict[str, Score]]) -> tuple[str, ...]:
    """Of the variants of each benchmark, the one that most models have; the first of `BENCHMARKS` among equals."""
    chosen: dict[str, str] = {}
    for name in sorted(benchmarks, key=lambda name: -sum(name in row for row in scores.values())):
        chosen.setdefault(BENCHMARKS[name].base, name)
    return tuple(name for name in benchmarks if name in chosen.values())


def _variants_note(benchmarks: tuple[str, ...], averaged: tuple[str, ...]) -> list[str]:
    """A note on the variants that the average leaves out for another of the same benchmark."""
    counted = {BENCHMARKS[name].base: name for name in averaged}
    omitted = [
        f"{name} ({counted[base]} counts)"
        for name in benchmarks
        if (base := BENCHMARKS[name].base) in counted and counted[base] != name
    ]
    return [f"average: each benchmark counts once, without {', '.join(omitted)}"] if omitted else []


def _settings_note(artifacts: dict[str, Artifact], name: str, baseline: str) -> str | None:
    """The settings of a model that differ from the baseline's; their means are not comparable."""
    manifests = [artifacts[model].manifest for model in (name, baseline)]
    settings, expected = (manifest.config | {"day": manifest.day} for manifest in manifests)
    different = [
        f"{key.replace('_', ' ')} {settings.get(key)} instead of {expected.get(key)}"
        for key in SETTINGS
        if settings.get(key) != expected.get(key)
    ]
    templates = {manifest.model("evaluated").chat_template for manifest in manifests}
    if len(templates) > 1 and all(manifest.config.get("chat_template") is not False for manifest in manifests):
        different.append("another chat template")
    return f"{name}: its settings differ from those of {baseline} ({', '.join(different)})" if different else None


def _benchmark_difference(artifacts: dict[str, Artifact], name: str, baseline: str, benchmark: str) -> Difference:
    model_scores, baseline_scores = (document_scores(artifacts[model], benchmark) for model in (name, baseline))
    common = sorted(model_scores.keys() & baseline_scores.keys())
    if not common:
        raise InputError(
            f"{name} and {baseline} have no documents of {benchmark} in common.",
            "Evaluate both with the same --data and --limit.",
        )
    weights = np.array([model_scores[document][1] for document in common])
    return paired_difference(
        np.array([model_scores[document][0] for document in common]),
        np.array([baseline_scores[document][0] for document in common]),
        weights,
    )


def document_scores(artifact: Artifact, benchmark: str) -> dict[tuple[str, int, str], tuple[float, float]]:
    """Score and weight of each document by the headline metric; keys are subtask, number and hash.

    The score of a document with several samples is their mean: documents, not samples, are independent.
    """
    metric = artifact.manifest.summary[benchmark]["metric"]
    columns = ["subtask", "document", "document_hash", "score", "weight", "metric"]
    part = artifact.table_part(f"{BENCHMARKS[benchmark].file_stem}.parquet")
    scores: dict[tuple[str, int, str], list[float]] = {}
    weights = {}
    for row in artifact.read_part(part, columns).to_pylist():
        if row["metric"] == metric:
            document = row["subtask"], row["document"], row["document_hash"]
            scores.setdefault(document, []).append(row["score"])
            weights[document] = row["weight"]
    return {document: (sum(values) / len(values), weights[document]) for document, values in scores.items()}


def _scores(summary: dict[str, Any]) -> dict[str, Score]:
    return {
        name: Score(
            **{key: result[key] for key in ("value", "stderr", "documents", "truncated", "prompts_truncated")},
            samples=result.get("samples", 1),
            pass_at={int(k): Score(*estimate) for k, estimate in result.get("pass_at", {}).items()},
            stopped=sum(result.get("stopped_by", {}).values()),
        )
        for name in BENCHMARKS
        if (result := summary.get(name))
    }


def _average(row: dict[str, Score], benchmarks: tuple[str, ...]) -> dict[str, Score]:
    """The mean over benchmarks, with equal weights; empty when one is missing."""
    if not row.keys() >= set(benchmarks):
        return {}
    scores = [row[benchmark] for benchmark in benchmarks]
    errors = [score.stderr for score in scores if score.stderr is not None]
    error = sqrt(sum(e * e for e in errors)) / len(scores) if len(errors) == len(scores) else None
    return {AVERAGE: Score(sum(score.value for score in scores) / len(scores), error)}


def _average_difference(row: dict[str, Difference], benchmarks: tuple[str, ...]) -> dict[str, Difference]:
    """The mean over benchmarks with a z-test; empty when one is missing."""
    if not row.keys() >= set(benchmarks):
        return {}
    differences = [row[benchmark] for benchmark in benchmarks]
    value = sum(d.value for d in differences) / len(differences)
    error = sqrt(sum(d.stderr**2 for d in differences)) / len(differences)
    p = erfc(abs(value) / error / sqrt(2)) if error else 1.0
    wins, losses, documents = (
        sum(values) for values in zip(*((d.wins, d.losses, d.documents) for d in differences), strict=True)
    )
    return {AVERAGE: Difference(value, error, p, wins, losses, documents)}


def _model_names(artifacts: dict[str, Artifact]) -> list[str]:
    return [model.name for artifact in artifacts.values() for model in artifact.manifest.models]
