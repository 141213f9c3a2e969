"""Results side by side: means with standard errors, and paired differences on the documents two models both answered.

Reads results artifacts and the paper's numbers (paper.json); loads neither torch nor lm-eval.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import erfc, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from tsdkd.artifacts.reader import Artifact
from tsdkd.errors import InputError
from tsdkd.stages.results import published
from tsdkd.stages.results.benchmarks import BENCHMARKS
from tsdkd.stages.results.published import AVERAGE

ORDER = {"teacher": 0, "student": 1, "distilled": 2}
"""In which results of one run are shown."""
RESAMPLES = 10_000
SETTINGS = ("limit", "max_new_tokens", "max_length", "chat_template", "engine", "dtype")
"""Of an evaluation: what its means depend on."""


@dataclass(frozen=True, slots=True)
class Score:
    """A mean in [0, 1]; what the paper publishes has no more than a value."""

    value: float
    stderr: float | None = None
    documents: int | None = None
    truncated: int = 0
    prompts_cut: int = 0


@dataclass(frozen=True, slots=True)
class Difference:
    """To the baseline, on the documents that both answered."""

    value: float
    stderr: float
    p: float
    """Two-sided: McNemar's exact test where verdicts are 0 and 1, else a paired bootstrap."""
    wins: int
    losses: int
    documents: int


@dataclass(frozen=True, slots=True)
class Comparison:
    benchmarks: tuple[str, ...]
    """In the table's order; more than one are followed by their average: of those that the paper has, else of all."""
    baseline: str
    scores: dict[str, dict[str, Score]]
    """By model, then by benchmark."""
    differences: dict[str, dict[str, Difference]]
    published: dict[str, dict[str, Score]]
    """The paper's rows, by method; a benchmark that is not there is none of the paper's."""
    held_out: dict[str, dict[str, Any]]
    """Closeness to the teacher, where it was measured."""
    notes: tuple[str, ...] = ()
    """What to know of models that were measured otherwise, and of the paper's rows."""
    skipped: tuple[str, ...] = ()
    """Why there is no difference where two models share a benchmark."""


def compare(
    artifacts: dict[str, Artifact], baseline: str | None = None, paper: str | None = None, *, skip: bool = False
) -> Comparison:
    """Results by the name to show. `baseline`: "student" where there is one, else the first; `paper`: by model names.

    Raises InputError for an unknown baseline or table of the paper, or when two models share a benchmark but no
    document of it: unless `skip`, which leaves that difference out and says why.
    """
    baseline = baseline or ("student" if "student" in artifacts else next(iter(artifacts)))
    if baseline not in artifacts:
        raise InputError(f"There are no results named {baseline}.", f"Choose from: {', '.join(artifacts)}.")
    found = {name: artifact.manifest.summary for name, artifact in artifacts.items()}
    benchmarks = tuple(one for one in BENCHMARKS if any(one in summary for summary in found.values()))
    scores = {name: _scores(summary) for name, summary in found.items()}
    differences: dict[str, dict[str, Difference]] = {name: {} for name in artifacts if name != baseline}
    skipped = []
    for name, row in differences.items():
        for one in (one for one in benchmarks if one in scores[name] and one in scores[baseline]):
            try:
                row[one] = _difference(artifacts, name, baseline, one)
            except InputError as error:
                if not skip:
                    raise
                skipped.append(f"{error.cause} {error.remedy}")
    table = published.find_table(paper) if paper else published.matching_table(_models(artifacts))
    papers = {name: _as_scores(row) for name, row in table.shares(benchmarks).items()} if table else {}
    notes = [line for name in artifacts if (line := _otherwise(artifacts, name, baseline))]
    notes += table.told(benchmarks) if table else []
    if len(benchmarks) > 1:
        averaged = (table and table.shared(benchmarks)) or benchmarks
        for rows in (scores, papers):
            rows.update({name: row | _average(row, averaged) for name, row in rows.items()})
        differences = {name: row | _average_difference(row, averaged) for name, row in differences.items()}
        benchmarks = (*benchmarks, AVERAGE)
    held_out = {name: summary["held_out"] for name, summary in found.items() if "held_out" in summary}
    return Comparison(benchmarks, baseline, scores, differences, papers, held_out, tuple(notes), tuple(skipped))


def _otherwise(artifacts: dict[str, Artifact], name: str, baseline: str) -> str | None:
    """How a model was measured unlike the baseline, if it was: then means are not of the same."""
    ours, theirs = (artifacts[one].manifest.config for one in (name, baseline))
    unlike = [
        f"{key.replace('_', ' ')} {ours.get(key)} ({theirs.get(key)})"
        for key in SETTINGS
        if ours.get(key) != theirs.get(key)
    ]
    return f"{name} was measured otherwise than {baseline}: {', '.join(unlike)}" if unlike else None


def in_order(results: Path) -> tuple[int, str]:
    """What to sort the results of one run by."""
    return ORDER.get(results.name, len(ORDER)), results.name


def short_names(places: Sequence[Path]) -> list[str]:
    """The shortest ends of different paths that tell them apart; folders called "results" say nothing."""
    full = [place.resolve().parts for place in places]
    telling = [tuple(part for part in parts if part != "results") for parts in full]
    parts = telling if len(set(telling)) == len(full) else full
    length = next(n for n in range(1, max(map(len, parts)) + 1) if len({p[-n:] for p in parts}) == len(set(parts)))
    return ["/".join(p[-length:]) for p in parts]


def paired(ours: np.ndarray, theirs: np.ndarray, weights: np.ndarray) -> Difference:
    """Two models' scores of the same documents, (documents,) each; weights are the documents' shares in the mean."""
    gains: np.ndarray = ours - theirs
    value = float((weights * gains).sum() / weights.sum())
    spread = float(np.square(weights * (gains - value)).sum()) * len(gains) / max(len(gains) - 1, 1)
    wins, losses = int((gains > 0).sum()), int((gains < 0).sum())
    binary = set(np.unique(np.concatenate([ours, theirs])).tolist()) <= {0.0, 1.0}
    p = _mcnemar(wins, losses) if binary else _bootstrap(gains, weights)
    return Difference(value, sqrt(spread) / float(weights.sum()), p, wins, losses, len(gains))


def _mcnemar(wins: int, losses: int) -> float:
    """How often a fair coin, thrown for each document that one model alone got right, is as one-sided or more."""
    tosses = wins + losses
    rarer = ways = 1  # of throwing i heads: each from the one before, since a hundred thousand tosses can be there
    for i in range(min(wins, losses)):
        ways = ways * (tosses - i) // (i + 1)
        rarer += ways
    return min(1.0, 2 * rarer / (1 << tosses))


def _bootstrap(gains: np.ndarray, weights: np.ndarray) -> float:
    """How often the mean gain has the other sign when the documents are drawn again, with replacement."""
    drawn = np.random.default_rng(0).multinomial(len(gains), np.full(len(gains), 1 / len(gains)), size=RESAMPLES)
    means = drawn @ (weights * gains)
    other = min(int((means <= 0).sum()), int((means >= 0).sum()))
    return min(1.0, 2 * (other + 1) / (RESAMPLES + 1))


def _difference(artifacts: dict[str, Artifact], name: str, baseline: str, benchmark: str) -> Difference:
    ours, theirs = (verdicts(artifacts[model], benchmark) for model in (name, baseline))
    common = sorted(ours.keys() & theirs.keys())
    if not common:
        raise InputError(
            f"{name} and {baseline} answered different documents of {benchmark}.",
            "Measure both with the same --data and --limit.",
        )
    weights = np.array([ours[document][1] for document in common])
    one, other = (np.array([found[document][0] for document in common]) for found in (ours, theirs))
    return paired(one, other, weights)


def verdicts(artifact: Artifact, benchmark: str) -> dict[tuple[str, int, str], tuple[float, float]]:
    """Score and weight of each document, by the headline metric."""
    wanted = artifact.manifest.summary[benchmark]["metric"]
    columns = ["subtask", "document", "hash", "score", "weight", "metric"]
    rows = pq.read_table(artifact.path / f"{BENCHMARKS[benchmark].key}.parquet", columns=columns).to_pylist()
    return {
        (row["subtask"], row["document"], row["hash"]): (row["score"], row["weight"])
        for row in rows
        if row["metric"] == wanted
    }


def _scores(summary: dict[str, Any]) -> dict[str, Score]:
    return {
        name: Score(found["value"], found["stderr"], found["documents"], found["truncated"], found["prompts_cut"])
        for name in BENCHMARKS
        if (found := summary.get(name))
    }


def _average(row: dict[str, Score], benchmarks: tuple[str, ...]) -> dict[str, Score]:
    """Of all benchmarks, each counting the same; none where one is missing."""
    if not row.keys() >= set(benchmarks):
        return {}
    found = [row[one] for one in benchmarks]
    errors = [score.stderr for score in found if score.stderr is not None]
    error = sqrt(sum(e * e for e in errors)) / len(found) if len(errors) == len(found) else None
    return {AVERAGE: Score(sum(score.value for score in found) / len(found), error)}


def _average_difference(row: dict[str, Difference], benchmarks: tuple[str, ...]) -> dict[str, Difference]:
    if not row.keys() >= set(benchmarks):
        return {}
    found = [row[one] for one in benchmarks]
    value, error = sum(d.value for d in found) / len(found), sqrt(sum(d.stderr**2 for d in found)) / len(found)
    p = erfc(abs(value) / error / sqrt(2)) if error else 1.0
    wins, losses, documents = (
        sum(values) for values in zip(*((d.wins, d.losses, d.documents) for d in found), strict=True)
    )
    return {AVERAGE: Difference(value, error, p, wins, losses, documents)}


def _models(artifacts: dict[str, Artifact]) -> list[str]:
    return [model.name for artifact in artifacts.values() for model in artifact.manifest.models]


def _as_scores(row: dict[str, float]) -> dict[str, Score]:
    return {benchmark: Score(value) for benchmark, value in row.items()}
