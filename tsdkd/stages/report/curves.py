"""Training's log as charts: one a measure, one curve a run, thinned to what a page can show."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise

from tsdkd.stages.pages.charts import Chart, Series, lines
from tsdkd.stages.report.runs import Run

POINTS = 1200
"""Of all curves of a chart together; of each, at least `FEWEST`."""
FEWEST = 60
Entry = dict[str, float]


@dataclass(frozen=True, slots=True)
class Measure:
    """A chart: what it shows, in which unit, and the log's names of its curves with what tells them apart."""

    title: str
    unit: str
    curves: dict[str, str] = field(default_factory=dict)


TRAINING = (
    Measure("Loss", "nats", {"loss": ""}),
    Measure("Ranking term", "nats", {"indirect": ""}),
    Measure("Divergence term", "nats", {"direct": ""}),
    Measure("Entropy term: the most uncertain tokens", "nats", {"entropy": ""}),
    Measure("Long-range term: what is to come", "nats", {"policy_gradient": ""}),
)
HEALTH = (
    Measure("Mean entropy", "nats", {"student_entropy": "student", "teacher_entropy": "teacher"}),
    Measure("Same best token as the teacher", "share of tokens", {"top1_agreement": ""}),
    Measure("Agreement on the candidates' order", "Kendall's tau", {"rank_agreement": ""}),
    Measure("Candidates as scored", "share", {"candidate_overlap": ""}),
    Measure("Drift since scoring", "nats", {"drift": ""}),
    Measure("Weight of the gate", "mean over tokens", {"gate": ""}),
    Measure("Length", "tokens", {"response_length": "response", "opener_length": "opener"}),
    Measure("Responses cut off or repeating", "share", {"truncated": "cut off", "repeating": "repeating"}),
    Measure("Gradient norm before clipping", "norm", {"grad_norm": ""}),
    Measure("Learning rate", "rate", {"learning_rate": ""}),
)
HELD_OUT = (
    Measure("KL to the teacher, held-out prompts", "nats a token", {"eval_kl": ""}),
    Measure("Cross-entropy of the teacher's answers, held-out prompts", "nats a token", {"eval_cross_entropy": ""}),
    Measure("Same best token, held-out prompts", "share of tokens", {"eval_agreement": ""}),
    Measure("Entropy, held-out prompts", "nats a token", {"eval_entropy": ""}),
)


def logs(runs: list[Run]) -> dict[str, list[Entry]]:
    """Of each trained checkpoint, finished or not, by the shortest name."""
    found = {}
    for run in runs:
        for piece in run.trained:
            first = run.name if len(runs) > 1 else ""
            last = piece.name if len(run.trained) > 1 or not first else ""
            found[" ".join(filter(None, (first, last)))] = piece.log
    return {name: log for name, log in found.items() if log}


def charts(measures: Iterable[Measure], known: dict[str, list[Entry]]) -> list[Chart]:
    """Those of which something was logged."""
    most = max(FEWEST, POINTS // max(1, len(known)))
    found = []
    logged = {key for log in known.values() for entry in log for key in entry}
    for measure in measures:
        series = [
            thinned(_name(name, what, alone=len(known) == 1), log, key, most)
            for name, log in known.items()
            for key, what in measure.curves.items()
            if key in logged
        ]  # empty ones too: a run has one colour in all charts
        if any(one.x for one in series):
            found.append(lines(measure.title, "step", measure.unit, series, said=_said(measure, known)))
    return found


def thinned(name: str, log: list[Entry], key: str, most: int) -> Series:
    """One point a step; where there are more than `most`, means of neighbours at their last step, in their range."""
    steps = [entry["step"] for entry in log if key in entry]
    values = [entry[key] for entry in log if key in entry]
    if len(values) <= most:
        return Series(name, steps, values)
    edges = [len(values) * i // most for i in range(most + 1)]
    groups = [values[a:b] for a, b in pairwise(edges)]
    return Series(
        name,
        [steps[edge - 1] for edge in edges[1:]],
        [sum(group) / len(group) for group in groups],
        [min(group) for group in groups],
        [max(group) for group in groups],
    )


def _name(log: str, what: str, *, alone: bool) -> str:
    return (what or log) if alone else f"{log} {what}".strip()


def _said(measure: Measure, known: dict[str, list[Entry]]) -> str:
    """Each curve in a sentence."""
    said = []
    for name, log in known.items():
        for key, what in measure.curves.items():
            if values := [entry[key] for entry in log if key in entry]:
                curve = _name(name, what, alone=len(known) == 1)
                label = f"{curve}: " if what or len(known) > 1 else ""
                range_ = f"between {min(values):.4g} and {max(values):.4g}"
                said.append(f"{label}{values[0]:.4g} at first, {values[-1]:.4g} at last, {range_}")
    return "; ".join(said) + "."
