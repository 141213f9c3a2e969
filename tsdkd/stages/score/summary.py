"""The summary of finished scores; reads them part by part, without the teacher signal's large columns."""

import numpy as np
import pyarrow as pa

from tsdkd.artifacts.files import HEAD_FILE
from tsdkd.artifacts.manifest import Part
from tsdkd.artifacts.reader import Artifact
from tsdkd.stages.config.score import ScoreConfig
from tsdkd.stages.data.rollout_lengths import LENGTH_COLUMNS
from tsdkd.stages.data.score_cost import ScoreWorkload, score_cost, score_workload
from tsdkd.stages.data.served_scoring import SERVED_COLUMNS
from tsdkd.stages.data.signal_storage import LOSSY_SIGNALS, head_shape
from tsdkd.stages.data.turns import response_turns

COLUMNS = ["student_entropy", "teacher_entropy", "student_log_prob", "teacher_log_prob"]
"""Columns with one value per response token, of every signal."""
MASS_QUANTILE = 0.01
"""Of `captured_mass_p01`: this fraction of tokens has at most that mass."""
MASS_BINS = 10_000

Column = np.ndarray[tuple[int], np.dtype[np.float64]]


def summarise(scores: Artifact, rollouts: Artifact, config: ScoreConfig) -> dict[str, float]:
    """Means over response tokens, in nats, with the counts of the work.

    A lossy signal adds the student's divergence from the full teacher distribution (`divergence`), from the recorded
    signal (`signal_divergence`), and their mean absolute difference (`divergence_error`). "topk" adds the teacher's
    probability mass in its top K (`captured_mass`). A served teacher adds the bounds of its entropy, and the mean
    number of candidates that are tied (`tied_candidates`). Rollouts with masks add the number of `turns`.
    """
    head, workload, turns = head_shape(scores.path / HEAD_FILE), ScoreWorkload(), 0
    sums: dict[str, float] = {}
    mass_histogram = np.zeros(MASS_BINS, dtype=np.int64)
    for part, parent in zip(sorted(scores.tables, key=lambda part: part.file), rollouts.tables, strict=True):
        rows = rollouts.read_part(parent, LENGTH_COLUMNS)
        workload += score_workload(rows)
        turns += sum(len(response_turns(len(mask), mask)) for mask in rows["response_mask"].to_pylist() if mask)
        for name, values in _token_values(scores, part, config).items():
            sums[name] = sums.get(name, 0.0) + float(values.sum())
            if name == "captured_mass":
                mass_histogram += np.histogram(values, MASS_BINS, (0, 1))[0]
    tokens = workload.response_tokens
    summary = {name: total / tokens for name, total in sums.items()} | ({"turns": turns} if turns else {})
    if config.signal == "topk":
        summary["captured_mass_p01"] = float((mass_histogram.cumsum() < MASS_QUANTILE * tokens).sum() / MASS_BINS)
    expected = score_cost(config, head, tokens).bytes
    return {"response_tokens": tokens, "expected_bytes": expected, **summary}


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
