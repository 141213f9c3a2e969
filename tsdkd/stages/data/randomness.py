"""Samples made while training goes on: the student answers with its current weights, a live teacher reads along."""

from tsdkd.artifacts.hashing import json_digest


def random_integer(*key: int | str) -> int:
    """Below 2**60, spread evenly."""
    return int(json_digest(list(key))[:15], 16)
