"""Checks that models can read recorded rollouts, before anything is written."""

from collections.abc import Iterable

import pyarrow.compute as pc

from tsdkd.artifacts.reader import Artifact
from tsdkd.stages.data.rollout_lengths import sequence_lengths
from tsdkd.stages.models.context import require_context
from tsdkd.stages.models.spec import ModelSpec
from tsdkd.stages.models.vocabulary import require_known_ids

ID_COLUMNS = ["prompt_ids", "response_ids"]


def require_readable(rollouts: Artifact, models: Iterable[ModelSpec]) -> None:
    """Raises InputError for a model with a shorter context than the longest sequence, or without one of its ids."""
    longest = largest_id = 0
    for part in rollouts.tables:
        table = rollouts.read_part(part, ID_COLUMNS)
        longest = max(longest, *sequence_lengths(table))
        largest_id = max(largest_id, *(pc.max(pc.list_flatten(table[name])).as_py() or 0 for name in ID_COLUMNS))
    for model in models:
        require_context([model], longest, recorded=True)
        require_known_ids(model.name, model.vocab, largest_id)
