"""The fingerprint of a served teacher: its own log-probabilities of the self-test's tokens, in thousandths of a nat.

A server's answers differ a little from call to call, because rounding depends on what it computes beside them. So the
fingerprint holds values that can be compared, not a hash.
"""

import torch
from torch import Tensor

VALUES = 16
"""Log-probabilities in a fingerprint; each is 4 hexadecimal digits."""
TOLERANCE = 0.1
"""Mean difference, in nats, that rounding explains."""


def fingerprint(token_log_probs: Tensor) -> str:
    """64 hexadecimal digits from the log-probabilities of at least `VALUES` tokens, evenly spaced."""
    chosen = token_log_probs[torch.linspace(0, len(token_log_probs) - 1, VALUES).long()]
    thousandths = (-1000 * chosen).round().clamp(0, 0xFFFF).long().tolist()
    return "".join(f"{value:04x}" for value in thousandths)


def difference(first: str, second: str) -> float:
    """The mean absolute difference of two fingerprints, in nats."""
    pairs = zip(_thousandths(first), _thousandths(second), strict=True)
    return sum(abs(a - b) for a, b in pairs) / VALUES / 1000


def same_teacher(first: str, second: str) -> bool:
    """Whether rounding explains the difference of two fingerprints."""
    return difference(first, second) <= TOLERANCE


def _thousandths(text: str) -> list[int]:
    return [int(text[start : start + 4], 16) for start in range(0, len(text), 4)]
