"""Tables of results: means with intervals over seeds, and differences paired by seed with their tests."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from recipes.experiment.statistics import Runs, format_interval, holm, paired_differences, paired_p

MEASURES = {
    "accuracy": ("accuracy %", "accuracy, points", 100, 1),
    "sampled_accuracy": ("sampled accuracy %", "sampled, points", 100, 1),
    "kl": ("KL", "KL, difference", 1, 4),
}
"""The measures that are tested: headings of value and difference, scale, digits."""
COLUMNS = [
    *("", "learning rate", "seeds"),
    *(heading for value, difference, _, _ in MEASURES.values() for heading in (value, difference)),
    *("entropy", "length", "truncated", "degenerated", "tokens learned", "s/step", "times"),
]
MEANINGLESS = "**SCALE=tiny: the models are untrained, and the numbers mean nothing.**"
EXPLANATION = """\
Intervals are 95 %, by Student's t over seeds. Differences are paired by seed: both models start from the same student
and train on the same prompts. p is two-sided, from the paired t-test with Holm's correction. Accuracy, length and
truncation are measured on responses at temperature 0, sampled accuracy at temperature 1. KL is KL(teacher ‖ student).
KL and the student's entropy are nats per token, measured on the teacher's responses. "s/step" is the median time of a
step while all workers run, without the time to record responses before training; "times" divides it by the
reference's. A model whose training warned of degeneration counts as degenerated; one whose loss, gradient or logits are
not finite also does, and has no accuracy: its method then has no differences."""


@dataclass(frozen=True)
class Row:
    """The runs of one arm and of its reference, the arm that it is compared with."""

    name: str
    runs: Runs
    reference: Runs
    rate: str = ""

    @property
    def is_reference(self) -> bool:
        return self.runs is self.reference

    def values(self, measure: str) -> list[float]:
        return [run[measure] for run in self.runs.values() if measure in run]

    def differences(self, measure: str) -> list[float]:
        """Differences to the reference, paired by seed; empty if one of the arm's seeds lacks the measure."""
        if len(self.values(measure)) < len(self.runs):
            return []  # the others would be a choice of the seeds that went well
        return paired_differences(self.runs, self.reference, measure)


def format_table(rows: Sequence[Row]) -> str:
    """A Markdown table. Holm's correction of a measure's p-values counts all rows except references."""
    tested = {row.name: row for row in rows if not row.is_reference}
    corrected = {
        measure: holm({name: paired_p(row.differences(measure)) for name, row in tested.items()})
        for measure in MEASURES
    }
    cells = [_cells(row, {measure: p.get(row.name) for measure, p in corrected.items()}) for row in rows]
    return format_lines([COLUMNS, *cells])


def format_lines(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first line is its heading."""
    heading, *others = lines
    return "\n".join(f"| {' | '.join(line)} |" for line in (heading, ["---"] * len(heading), *others))


def _cells(row: Row, p: dict[str, float | None]) -> list[str]:
    measured: list[str] = []
    for measure, (_, _, scale, digits) in MEASURES.items():
        values = [scale * value for value in row.values(measure)]
        some = f" ({len(values)} seeds)" if len(values) < len(row.runs) else ""
        measured.append(f"{format_interval(values, digits)}{some}" if values else "")
        differences = [] if row.is_reference else [scale * value for value in row.differences(measure)]
        measured.append(_format_difference(differences, digits, p[measure]) if differences else "")
    degenerated = row.values("degenerated")
    seconds, reference = row.values("seconds_per_step"), Row("", row.reference, {}).values("seconds_per_step")
    return [
        *(row.name, row.rate, str(len(row.runs)), *measured),
        *(_mean(row, "entropy", ".3f"), _mean(row, "length", ".1f"), _mean(row, "truncated", ".1%")),
        f"{sum(degenerated)} of {len(degenerated)}" if degenerated else "",
        _mean(row, "tokens", ".0f"),
        _mean(row, "seconds_per_step", ".3f"),
        f"{fmean(seconds) / fmean(reference):.2f}" if seconds and reference else "",
    ]


def _format_difference(values: list[float], digits: int, p: float | None) -> str:
    shown = f"{'+' * (fmean(values) > 0)}{format_interval(values, digits)}"
    if p is None or len(values) < 2:
        return shown
    return f"{shown} (p {'<0.001' if p < 0.001 else format(p, '.3f')})"


def _mean(row: Row, measure: str, format_: str) -> str:
    known = row.values(measure)
    return format(fmean(known), format_) if known else ""
