"""Lengths of the rows of a rollouts table, in tokens."""

import pyarrow as pa
import pyarrow.compute as pc

LENGTH_COLUMNS = ["prompt_ids", "response_ids", "response_mask"]
"""The columns that the lengths follow from."""


def sequence_lengths(rollouts: pa.Table) -> list[int]:
    """Tokens of each prompt with its response."""
    lengths: list[int] = pc.add(*(pc.list_value_length(rollouts[name]) for name in LENGTH_COLUMNS[:2])).to_pylist()
    return lengths


def trained_lengths(rollouts: pa.Table) -> list[int]:
    """Tokens of each response that are learned: those that its mask marks; without a mask, all."""
    lengths = pc.list_value_length(rollouts["response_ids"]).to_pylist()
    masks = rollouts["response_mask"].to_pylist()
    return [n if mask is None else sum(mask) for n, mask in zip(lengths, masks, strict=True)]
