"""Sequences into padded tensors, and batches of similar length. Padding ids are 0 and never looked at."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

Ids = Sequence[int]


def batches_by_length(
    lengths: Sequence[int], *, size: int | None = None, tokens: int | None = None, padding: float = 1.0
) -> Iterator[list[int]]:
    """Indices in batches of similar length, longest first (so that memory is at its peak at once).

    At most `size` sequences, or at most `tokens` padded tokens (and one sequence at least), in a batch, of whose padded
    tokens at most the share `padding` is padding.
    """
    batch: list[int] = []
    real = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        padded = lengths[batch[0]] * (len(batch) + 1) if batch else 0
        full = len(batch) == size or (tokens and padded > tokens) or padded - real - lengths[index] > padding * padded
        if batch and full:
            yield batch
            batch, real = [], 0
        batch.append(index)
        real += lengths[index]
    if batch:
        yield batch


def consecutive_blocks(sizes: Sequence[int], most: int) -> Iterator[range]:
    """Runs of consecutive indices whose sizes add up to at most `most` (and one index at least)."""
    start = total = 0
    for index, size in enumerate(sizes):
        if index > start and total + size > most:
            yield range(start, index)
            start, total = index, 0
        total += size
    if len(sizes) > start:
        yield range(start, len(sizes))


def pad_left(rows: Sequence[Ids]) -> tuple[Tensor, Tensor]:
    """Ids and attention mask (batch, seq), aligned at the end."""
    width = max(map(len, rows))
    return _pad(rows, [width - len(row) for row in rows], width)


def pad_right(rows: Sequence[Ids]) -> tuple[Tensor, Tensor]:
    """Ids and attention mask (batch, seq), aligned at the start."""
    return _pad(rows, [0] * len(rows), max(map(len, rows)))


def join_right_padded(prompts: Sequence[Ids], responses: Sequence[Ids]) -> tuple[Tensor, Tensor, Tensor]:
    """Prompts and responses -> ids, attention mask, and mask of the positions that predict a response token.

    All (batch, seq), aligned at the start: the least padding.
    """
    ids, attention = pad_right([[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)])
    predicting = torch.zeros_like(ids, dtype=torch.bool)
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        predicting[i, len(prompt) - 1 : len(prompt) + len(response) - 1] = True
    return ids, attention, predicting


def align_responses(prompts: Sequence[Ids], responses: Sequence[Ids]) -> tuple[Tensor, Tensor, Tensor]:
    """Prompts and responses -> ids, attention mask (batch, seq) and response mask (batch, longest response).

    Every response begins in the same column: the logits of the last `1 + longest response` columns, less the last
    one, predict it.
    """
    before, after = max(map(len, prompts)), max(map(len, responses))
    rows = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
    ids, attention = _pad(rows, [before - len(prompt) for prompt in prompts], before + after)
    return ids, attention, attention[:, before:].bool()


def _pad(rows: Sequence[Ids], lefts: Sequence[int], width: int) -> tuple[Tensor, Tensor]:
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, (row, left) in enumerate(zip(rows, lefts, strict=True)):
        ids[i, left : left + len(row)] = torch.tensor(row)
        mask[i, left : left + len(row)] = 1
    return ids, mask
