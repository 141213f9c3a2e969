"""What finished scores say of themselves; read part by part, and only the light columns."""

import numpy as np
import pyarrow as pa

from tsdkd.artifacts.manifest import Part
from tsdkd.artifacts.reader import Artifact
from tsdkd.stages.config.score import ScoreConfig
from tsdkd.stages.data.score_cost import ScoreWorkload, score_cost, score_workload
from tsdkd.stages.data.teacher_signals import HEAD_FILE, LOSSY_SIGNALS, head_shape

LIGHT = ["student_entropy", "teacher_entropy", "student_log_prob", "teacher_log_prob"]
WORST = 0.01
"""The share of tokens whose captured mass is at most the one told."""
MASS_BINS = 10_000

Column = np.ndarray[tuple[int], np.dtype[np.float64]]


def summarise(scores: Artifact, rollouts: Artifact, config: ScoreConfig) -> dict[str, float]:
    """Means over response tokens, and what the work was.

    With a lossy signal also the student's divergence from the exact and from the recorded teacher, nats; with top-K
    also the mass that it captures.
    """
    head, load = head_shape(scores.path / HEAD_FILE), ScoreWorkload()
    sums: dict[str, float] = {}
    masses = np.zeros(MASS_BINS, dtype=np.int64)
    for part, parent in zip(sorted(scores.tables, key=lambda part: part.file), rollouts.tables, strict=True):
        load += score_workload(rollouts.read_part(parent, ["prompt_ids", "response_ids"]), config, head)
        for name, values in _columns(scores, part, config).items():
            sums[name] = sums.get(name, 0.0) + float(values.sum())
            if name == "captured_mass":
                masses += np.histogram(values, MASS_BINS, (0, 1))[0]
    summary = {name: total / load.response_tokens for name, total in sums.items()}
    if config.signal == "topk":
        summary["captured_mass_worst"] = float((masses.cumsum() < WORST * load.response_tokens).sum() / MASS_BINS)
    expected = score_cost(config, head, load.response_tokens).bytes
    return {"tokens": load.response_tokens, "padding": load.padding, "expected_bytes": expected, **summary}


def _columns(scores: Artifact, part: Part, config: ScoreConfig) -> dict[str, Column]:
    """A part's values by response token."""
    lossy = ["divergence", "recorded_divergence"] if config.signal in LOSSY_SIGNALS else []
    top = ["top_log_probs"] if config.signal == "topk" else []
    table = scores.read_part(part, [*LIGHT, *lossy, *top])
    found = {name: _flat(table[name]) for name in table.column_names}
    if lossy:
        found["divergence_error"] = np.abs(found["divergence"] - found["recorded_divergence"])
    if top:
        mass = np.exp(found.pop("top_log_probs")).reshape(-1, config.top_k).sum(-1)
        found["captured_mass"] = mass.clip(0, 1)
    return found


def _flat(column: pa.ChunkedArray) -> Column:
    values: Column = column.combine_chunks().flatten().to_numpy().astype(np.float64)
    return values
