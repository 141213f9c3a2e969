"""Statistics of the selection over all responses of a scores artifact, accumulated while they are read."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from tsdkd.core.config import TSDKDConfig
from tsdkd.stages.inspect.numpy_selection import (
    Array,
    gate_weights,
    kendall_tau,
    opener_fraction_chooser,
    opener_length,
    ranks_of_first,
)
from tsdkd.stages.inspect.recorded import ENTROPY_COLUMNS, ColumnBatch, MasksOf, ScoresReader
from tsdkd.stages.inspect.response import describe_gate

BINS = 10
MAX_BARS = 12


@dataclass(slots=True)
class Histogram:
    """Counts of values in [low, high], in equal bins; a boundary belongs to the upper bin, `high` to the last."""

    low: float
    high: float
    counts: Array = field(default_factory=lambda: np.zeros(BINS, dtype=np.int64))
    total: float = 0.0
    """Sum of the values."""

    def add(self, values: Array) -> None:
        self.counts += np.histogram(values, BINS, (self.low, self.high))[0]
        self.total += float(values.sum())

    @property
    def mean(self) -> float:
        return self.total / int(self.counts.sum())

    @property
    def bin_centres(self) -> list[float]:
        width = (self.high - self.low) / BINS
        return [round(self.low + (i + 0.5) * width, 6) for i in range(BINS)]


@dataclass(slots=True)
class Aggregate:
    """Sums and histograms over the turns of responses; entropies in nats. Positions count within a turn."""

    objective: TSDKDConfig
    responses: int = 0
    turns: int = 0
    """As many as responses, unless these are conversations."""
    tokens: int = 0
    responses_by_position: Array = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """Turns that have a token at each position."""
    entropy_sums: Array = field(default_factory=lambda: np.zeros((2, 0)))
    """Sums of student and teacher entropy at each position: (2, positions)."""
    entropy_squares: Array = field(default_factory=lambda: np.zeros((2, 0)))
    """Sums of their squares: (2, positions)."""
    opener_lengths: Counter[int] = field(default_factory=Counter)
    opener_fractions: Counter[float] = field(default_factory=Counter)
    """The c of each turn."""
    opener_entropy_fractions: float = 0.0
    """Sum over turns of the fraction of entropy in the opener."""
    gates: Histogram = field(default_factory=lambda: Histogram(0, 1))
    agreement: Histogram = field(default_factory=lambda: Histogram(-1, 1))
    """Kendall's tau of the student's and the teacher's order of the candidates."""
    opener_agreement: float = 0.0
    """Sum of Kendall's tau over the tokens in openers."""
    same_best: int = 0
    """Tokens where the student and the teacher prefer the same candidate."""
    captured_mass: Histogram = field(default_factory=lambda: Histogram(0, 1))
    """The probability in the teacher's top K; empty unless the signal is "topk"."""

    def add(self, batch: ColumnBatch, ranks: Array, choose_fraction: Callable[[Array, Array], float]) -> None:
        """Add some responses, with the teacher's ranks (tokens, k) and a function that returns the opener's c."""
        student, teacher = (batch.columns[name] for name in ENTROPY_COLUMNS)
        agreement = kendall_tau(ranks)
        self.agreement.add(agreement)
        has_gate = self.objective.gate
        self.gates.add(gate_weights(student, teacher, self.objective.tau) if has_gate else np.ones(len(student)))
        self.same_best += int((ranks[:, 0] == 0).sum())
        split = map(batch.split, (student, teacher, agreement))
        self.responses += len(batch.turns)
        for turn_student, turn_teacher, turn_agreement in zip(*split, strict=True):
            fraction = choose_fraction(turn_student, turn_teacher)
            self._add_turn(turn_student, turn_teacher, turn_agreement, fraction)

    def _add_turn(self, student: Array, teacher: Array, agreement: Array, fraction: float) -> None:
        length, opener = len(student), opener_length(student, fraction)
        self.turns += 1
        self.tokens += length
        self._grow_positions(length)
        self.responses_by_position[:length] += 1
        entropies = np.stack([student, teacher]).astype(np.float64)
        self.entropy_sums[:, :length] += entropies
        self.entropy_squares[:, :length] += entropies**2
        self.opener_lengths[opener] += 1
        self.opener_fractions[fraction] += 1
        total = float(student.sum())
        self.opener_entropy_fractions += float(student[:opener].sum()) / total if total > 0 else 1.0
        self.opener_agreement += float(agreement[:opener].sum())

    def _grow_positions(self, length: int) -> None:
        missing = length - len(self.responses_by_position)
        if missing > 0:
            self.responses_by_position = np.pad(self.responses_by_position, (0, missing))
            self.entropy_sums = np.pad(self.entropy_sums, ((0, 0), (0, missing)))
            self.entropy_squares = np.pad(self.entropy_squares, ((0, 0), (0, missing)))

    @property
    def has_gate(self) -> bool:
        return bool(self.objective.gate and self.objective.direct_weight)

    @property
    def mean_entropy_by_position(self) -> Array:
        """Of student and teacher: (2, positions)."""
        means: Array = self.entropy_sums / self.responses_by_position
        return means

    @property
    def standard_errors_by_position(self) -> Array:
        """Of the mean entropies: (2, positions); nan at a position that a single turn has."""
        counts = np.where(self.responses_by_position > 1, self.responses_by_position, np.nan)
        squared_deviations = (self.entropy_squares - self.entropy_sums**2 / counts).clip(0)
        errors: Array = np.sqrt(squared_deviations / (counts * (counts - 1)))
        return errors

    @property
    def opener_length_bins(self) -> list[tuple[int, int]]:
        """(shortest length, number of openers) of at most `MAX_BARS` bins of equal width."""
        longest = max(self.opener_lengths)
        width = -(-longest // MAX_BARS)
        binned: Counter[int] = Counter()
        for length, count in self.opener_lengths.items():
            binned[(length - 1) // width * width + 1] += count
        return [(shortest, binned[shortest]) for shortest in range(1, longest + 1, width)]

    @property
    def summary(self) -> list[tuple[str, str]]:
        """Names and values to show."""
        student, teacher = self.entropy_sums.sum(-1) / self.tokens
        split = self.turns > self.responses
        turns, unit = (f" in {self.turns:,} turns", "turn") if split else ("", "response")
        rows = [
            ("responses", f"{self.responses:,}{turns} with {self.tokens:,} tokens"),
            ("mean entropy", f"student {student:.3f}, teacher {teacher:.3f} nats per token"),
        ]
        agreement = f"Kendall's tau {self.agreement.mean:.3f} on all tokens"
        if self.objective.alpha:
            opener_tokens = sum(length * count for length, count in self.opener_lengths.items())
            mean, fraction = opener_tokens / self.turns, opener_tokens / self.tokens
            fractions = sorted(self.opener_fractions.items())
            chosen = ", ".join(f"{c:g}: {count / self.turns:.1%}" for c, count in fractions)
            agreement += f", {self.opener_agreement / opener_tokens:.3f} in openers"
            rows += [
                ("opener length", f"mean {mean:.2f} tokens, {fraction:.1%} of all tokens"),
                (
                    "entropy in openers",
                    f"mean {self.opener_entropy_fractions / self.turns:.1%} of a {unit}'s entropy",
                ),
                ("opener c", f"{chosen} of the {unit}s"),
            ]
        rows += [
            ("gate", describe_gate(self.objective, self.gates.mean)),
            ("agreement", f"{agreement} (k = {self.objective.k})"),
            ("same best candidate", f"on {self.same_best / self.tokens:.1%} of the tokens"),
        ]
        if self.captured_mass.counts.any():
            rows.append(("captured mass", f"mean {self.captured_mass.mean:.3f}"))
        return rows


def aggregate_scores(
    scores: ScoresReader, masks_of: MasksOf, objective: TSDKDConfig, advance: Callable[[int], None]
) -> Aggregate:
    """Aggregate all responses in the artifact's order; `advance` receives the number of responses just read."""
    config = scores.artifact.manifest.config
    top_columns = ["top_log_probs"] if config["signal"] == "topk" else []
    aggregate, choose_fraction = Aggregate(objective), opener_fraction_chooser(objective)
    for batch in scores.stream([*ENTROPY_COLUMNS, "ranks", *top_columns], masks_of):
        ranks = ranks_of_first(batch.columns["ranks"].reshape(-1, scores.k), objective.k)
        aggregate.add(batch, ranks, choose_fraction)
        for name in top_columns:
            mass = np.exp(batch.columns[name].astype(np.float64)).reshape(-1, config["top_k"]).sum(-1)
            aggregate.captured_mass.add(mass.clip(0, 1))
        advance(len(batch.turns))
    return aggregate
