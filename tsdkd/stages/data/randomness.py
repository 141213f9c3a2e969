"""Random numbers that depend on a key alone: the same key gives the same number in every process and every run."""

from tsdkd.artifacts.hashing import json_digest


def random_integer(*key: int | str) -> int:
    """Uniform in [0, 2**60)."""
    return int(json_digest(list(key))[:15], 16)


def random_uniform(*key: int | str) -> float:
    """Uniform in [0, 1), in steps of 2**-52."""
    return int(json_digest(list(key))[:13], 16) / 16**13
