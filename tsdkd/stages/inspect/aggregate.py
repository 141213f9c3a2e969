"""What the method does over a whole artifact; sums and histograms grow while responses stream by."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from tsdkd.core.config import TSDKDConfig
from tsdkd.stages.inspect.recorded import ENTROPIES, ColumnBatch, RecordedScores
from tsdkd.stages.inspect.response import gate_in_words
from tsdkd.stages.inspect.selection import Array, first_ranks, fraction_chooser, gate, kendall_tau, opener_length

BINS = 10
MOST_BARS = 12


@dataclass(slots=True)
class Distribution:
    """Of values in [low, high], in equal bins; a value on a boundary belongs to the upper bin, `high` to the last."""

    low: float
    high: float
    counts: Array = field(default_factory=lambda: np.zeros(BINS, dtype=np.int64))
    total: float = 0.0

    def add(self, values: Array) -> None:
        self.counts += np.histogram(values, BINS, (self.low, self.high))[0]
        self.total += float(values.sum())

    @property
    def mean(self) -> float:
        return self.total / int(self.counts.sum())

    @property
    def centres(self) -> list[float]:
        """Of the bins."""
        width = (self.high - self.low) / BINS
        return [round(self.low + (i + 0.5) * width, 6) for i in range(BINS)]


@dataclass(slots=True)
class Aggregate:
    """Entropies in nats; means over tokens, where nothing else is said."""

    objective: TSDKDConfig
    responses: int = 0
    tokens: int = 0
    reached: Array = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """Responses that have a token at each position."""
    sums: Array = field(default_factory=lambda: np.zeros((2, 0)))
    """Of the student's and the teacher's entropies at each position."""
    opener_lengths: Counter[int] = field(default_factory=Counter)
    fractions: Counter[float] = field(default_factory=Counter)
    """The c of each response."""
    opener_share: float = 0.0
    """Sum over responses of the share of entropy in the opener."""
    gates: Distribution = field(default_factory=lambda: Distribution(0, 1))
    agreement: Distribution = field(default_factory=lambda: Distribution(-1, 1))
    """Kendall's tau of the student's and the teacher's order of the candidates."""
    opener_agreement: float = 0.0
    """Sum of it over the openers' tokens."""
    same_favourite: int = 0
    """Tokens where the student's best is the teacher's, among the candidates."""
    mass: Distribution = field(default_factory=lambda: Distribution(0, 1))
    """What the signal "topk" captures; empty with others."""

    def add(self, batch: ColumnBatch, ranks: Array, choose: Callable[[Array, Array], float]) -> None:
        """Some responses: the teacher's ranks (tokens, k), and what chooses an opener's c."""
        student, teacher = (batch.columns[name] for name in ENTROPIES)
        agreement = kendall_tau(ranks)
        self.agreement.add(agreement)
        self.gates.add(gate(student, teacher, self.objective.tau) if self.objective.gate else np.ones(len(student)))
        self.same_favourite += int((ranks[:, 0] == 0).sum())
        for one, other, both in zip(*map(batch.split, (student, teacher, agreement)), strict=True):
            self._add_response(one, other, both, choose(one, other))

    def _add_response(self, student: Array, teacher: Array, agreement: Array, fraction: float) -> None:
        length, opener = len(student), opener_length(student, fraction)
        self.responses += 1
        self.tokens += length
        self._reach(length)
        self.reached[:length] += 1
        self.sums[0, :length] += student
        self.sums[1, :length] += teacher
        self.opener_lengths[opener] += 1
        self.fractions[fraction] += 1
        total = float(student.sum())
        self.opener_share += float(student[:opener].sum()) / total if total > 0 else 1.0
        self.opener_agreement += float(agreement[:opener].sum())

    def _reach(self, length: int) -> None:
        missing = length - len(self.reached)
        if missing > 0:
            self.reached = np.pad(self.reached, (0, missing))
            self.sums = np.pad(self.sums, ((0, 0), (0, missing)))

    @property
    def gated(self) -> bool:
        """Has the objective a gate?"""
        return bool(self.objective.gate and self.objective.direct_weight)

    @property
    def by_position(self) -> Array:
        """Mean entropy of student and teacher at each position: (2, positions)."""
        means: Array = self.sums / self.reached
        return means

    @property
    def lengths(self) -> list[tuple[int, int]]:
        """Openers' lengths in at most `MOST_BARS` steps of equal width, and how many openers are of each.

        A step is named by its shortest length.
        """
        longest = max(self.opener_lengths)
        width = -(-longest // MOST_BARS)
        binned: Counter[int] = Counter()
        for length, count in self.opener_lengths.items():
            binned[(length - 1) // width * width + 1] += count
        return [(first, binned[first]) for first in range(1, longest + 1, width)]

    @property
    def facts(self) -> list[tuple[str, str]]:
        """Names and values for a person."""
        student, teacher = self.sums.sum(-1) / self.tokens
        opener_tokens = sum(length * count for length, count in self.opener_lengths.items())
        in_openers, k = self.opener_agreement / opener_tokens, self.objective.k
        chosen = ", ".join(f"{c:g}: {count / self.responses:.1%}" for c, count in sorted(self.fractions.items()))
        facts = [
            ("responses", f"{self.responses:,} with {self.tokens:,} tokens"),
            ("mean entropy", f"student {student:.3f}, teacher {teacher:.3f} nats a token"),
        ]
        if self.objective.alpha:
            mean, share = opener_tokens / self.responses, opener_tokens / self.tokens
            facts += [
                ("openers", f"mean {mean:.2f} tokens, {share:.1%} of all"),
                ("entropy in openers", f"mean {self.opener_share / self.responses:.1%} of a response's"),
                ("chosen c", f"{chosen} of the responses"),
            ]
        inside = f", {in_openers:.3f} in openers" if self.objective.alpha else ""
        facts += [
            ("gate", gate_in_words(self.objective, self.gates.mean)),
            ("agreement", f"Kendall's tau {self.agreement.mean:.3f} on all tokens{inside} (k = {k})"),
            ("same favourite", f"on {self.same_favourite / self.tokens:.1%} of the tokens"),
        ]
        return facts + ([("captured mass", f"mean {self.mass.mean:.3f}")] if self.mass.counts.any() else [])


def aggregate(scores: RecordedScores, objective: TSDKDConfig, advance: Callable[[int], None]) -> Aggregate:
    """Of all responses, in the artifact's order; `advance` is told of each."""
    config = scores.artifact.manifest.config
    top = ["top_log_probs"] if config["signal"] == "topk" else []
    found, choose = Aggregate(objective), fraction_chooser(objective)
    for batch in scores.stream([*ENTROPIES, "ranks", *top]):
        found.add(batch, first_ranks(batch.columns["ranks"].reshape(-1, scores.k), objective.k), choose)
        for name in top:
            mass = np.exp(batch.columns[name].astype(np.float64)).reshape(-1, config["top_k"]).sum(-1)
            found.mass.add(mass.clip(0, 1))
        advance(len(batch.lengths))
    return found
