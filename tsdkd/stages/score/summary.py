"""The summary of finished scores; reads them part by part, without the teacher signal's large columns."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from tsdkd.artifacts.files import HEAD_FILE, teacher_file, teacher_index
from tsdkd.artifacts.manifest import Part
from tsdkd.artifacts.reader import Artifact
from tsdkd.stages.config.score import ScoreConfig
from tsdkd.stages.data.rollout_lengths import LENGTH_COLUMNS
from tsdkd.stages.data.score_cost import ScoreWorkload, score_cost, score_workload
from tsdkd.stages.data.served_scoring import SERVED_COLUMNS
from tsdkd.stages.data.signal_storage import LOSSY_SIGNALS, head_shape
from tsdkd.stages.data.turns import response_turns
from tsdkd.stages.score.units import Unit

COLUMNS = ["student_entropy", "teacher_entropy", "student_log_prob", "teacher_log_prob"]
"""Columns with one value per response token, of every signal."""
MASS_QUANTILE = 0.01
"""Of `captured_mass_p01`: this fraction of tokens has at most that mass."""
MASS_BINS = 10_000

Column = np.ndarray[tuple[int], np.dtype[np.float64]]
Histogram = np.ndarray[tuple[int], np.dtype[np.int64]]


def summarise(scores: Artifact, rollouts: Artifact, units: list[Unit], config: ScoreConfig) -> dict[str, Any]:
    """Means over response tokens, in nats, with the counts of the work; `teachers` holds those of each named teacher.

    A lossy signal adds the student's divergence from the full teacher distribution (`divergence`), from the recorded
    signal (`signal_divergence`), and their mean absolute difference (`divergence_error`). "topk" adds the teacher's
    probability mass in its top K (`captured_mass`). A served teacher adds the bounds of its entropy, and the mean
    number of candidates that are tied (`tied_candidates`). Rollouts with masks add the number of `turns`.
    """
    overall, by_teacher, expected = Sums(), dict[str, Sums](), 0
    for unit in units:
        rows, values = unit.read(rollouts, LENGTH_COLUMNS), _token_values(scores, scores.table_part(unit.file), config)
        for sums in (overall, by_teacher.setdefault(unit.teacher, Sums())):
            sums.add(rows, values)
    for unit in {unit.teacher: unit for unit in units}.values():
        head = head_shape(scores.path / teacher_file(HEAD_FILE, teacher_index(unit.file)))
        expected += score_cost(config, head, by_teacher[unit.teacher].workload.response_tokens).bytes
    tokens = overall.workload.response_tokens
    named = {name: sums.counts() | sums.means(config) for name, sums in by_teacher.items() if name}
    summary: dict[str, Any] = {"response_tokens": tokens, "expected_bytes": expected, **overall.means(config)}
    return summary | ({"teachers": named} if named else {})


@dataclass
class Sums:
    """Sums over the response tokens of some rows."""

    workload: ScoreWorkload = field(default_factory=ScoreWorkload)
    responses: int = 0
    turns: int = 0
    values: dict[str, float] = field(default_factory=dict)
    mass_histogram: Histogram = field(default_factory=lambda: np.zeros(MASS_BINS, dtype=np.int64))

    def add(self, rows: pa.Table, values: dict[str, Column]) -> None:
        """Take rows of rollouts, and the values of their tokens by name."""
        self.workload += score_workload(rows)
        self.responses += len(rows)
        self.turns += sum(len(response_turns(len(mask), mask)) for mask in rows["response_mask"].to_pylist() if mask)
        for name, column in values.items():
            self.values[name] = self.values.get(name, 0.0) + float(column.sum())
            if name == "captured_mass":
                self.mass_histogram += np.histogram(column, MASS_BINS, (0, 1))[0]

    def counts(self) -> dict[str, float]:
        return {"responses": self.responses, "response_tokens": self.workload.response_tokens}

    def means(self, config: ScoreConfig) -> dict[str, float]:
        """Per token, by name; with the number of turns of rows with masks."""
        tokens = self.workload.response_tokens
        means = {name: total / tokens for name, total in self.values.items()}
        means |= {"turns": self.turns} if self.turns else {}
        if config.signal == "topk":
            below = self.mass_histogram.cumsum() < MASS_QUANTILE * tokens
            means["captured_mass_p01"] = float(below.sum() / MASS_BINS)
        return means


def _token_values(scores: Artifact, part: Part, config: ScoreConfig) -> dict[str, Column]:
    """The values of a part to average, (response tokens,) each, by name."""
    lossy = ["divergence", "signal_divergence"] if config.signal in LOSSY_SIGNALS else []
    top = ["top_log_probs"] if config.signal == "topk" else []
    table = scores.read_part(part, [*COLUMNS, *SERVED_COLUMNS, *lossy, *top])
    values = {name: _flat(table[name]) for name in table.column_names if not table[name].null_count}
    if "divergence" in values:
        values["divergence_error"] = np.abs(values["divergence"] - values["signal_divergence"])
    if top:
        mass = np.exp(values.pop("top_log_probs")).reshape(-1, config.top_k).sum(-1)
        values["captured_mass"] = mass.clip(0, 1)
    return values


def _flat(column: pa.ChunkedArray) -> Column:
    values: Column = column.combine_chunks().flatten().to_numpy().astype(np.float64)
    return values
