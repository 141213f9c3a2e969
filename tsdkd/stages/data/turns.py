"""The turns of a response: the pieces that its mask marks. Each is learned as a response of its own."""

from collections.abc import Sequence

Mask = Sequence[bool] | None
"""True at the tokens of a response that are learned; None: all of them."""


def response_turns(length: int, mask: Mask) -> list[range]:
    """The positions of each turn of a response of `length` tokens: those where the mask is True, in one piece.

    Without a mask the response is one turn.
    """
    if mask is None:
        return [range(length)]
    edges = [i for i in range(length + 1) if (i < length and mask[i]) != (i > 0 and mask[i - 1])]
    return [range(start, end) for start, end in zip(edges[::2], edges[1::2], strict=True)]


def turn_lengths(learned: int, mask: Mask) -> list[int]:
    """The tokens of each turn of a response with `learned` tokens that are learned."""
    return [learned] if mask is None else [len(turn) for turn in response_turns(len(mask), mask)]
