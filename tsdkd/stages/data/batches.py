"""Batches of similar length, and token ids padded to tensors. The padding id is 0; masks exclude it everywhere."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

Ids = Sequence[int]


def batches_by_length(
    lengths: Sequence[int], *, size: int | None = None, tokens: int | None = None, padding: float = 1.0
) -> Iterator[list[int]]:
    """Indices of sequences in batches of similar length, longest first, so that memory peaks in the first batch.

    A batch holds at most `size` sequences and at most `tokens` tokens, padding included, but at least one sequence.
    Padding is at most the fraction `padding` of its tokens.
    """
    batch: list[int] = []
    unpadded = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        padded = lengths[batch[0]] * (len(batch) + 1) if batch else 0
        padding_tokens = padded - unpadded - lengths[index]
        full = len(batch) == size or (tokens and padded > tokens) or padding_tokens > padding * padded
        if batch and full:
            yield batch
            batch, unpadded = [], 0
        batch.append(index)
        unpadded += lengths[index]
    if batch:
        yield batch


def consecutive_blocks(sizes: Sequence[int], limit: int) -> Iterator[range]:
    """Blocks of consecutive indices whose sizes sum to at most `limit`; each block has at least one index."""
    start = total = 0
    for index, size in enumerate(sizes):
        if index > start and total + size > limit:
            yield range(start, index)
            start, total = index, 0
        total += size
    if len(sizes) > start:
        yield range(start, len(sizes))


def pad_left(rows: Sequence[Ids]) -> tuple[Tensor, Tensor]:
    """Ids and attention mask (batch, seq); sequences end in the last column."""
    width = max(map(len, rows))
    return _pad(rows, [width - len(row) for row in rows], width)


def pad_right(rows: Sequence[Ids]) -> tuple[Tensor, Tensor]:
    """Ids and attention mask (batch, seq); sequences start in the first column."""
    return _pad(rows, [0] * len(rows), max(map(len, rows)))


def join_right_padded(prompts: Sequence[Ids], responses: Sequence[Ids]) -> tuple[Tensor, Tensor, Tensor]:
    """Prompts with responses -> ids, attention mask, and mask of the positions that predict a response token.

    All are (batch, seq). Sequences start in the first column, which needs the least padding.
    """
    ids, attention = pad_right([[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)])
    predicting = torch.zeros_like(ids, dtype=torch.bool)
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        predicting[i, len(prompt) - 1 : len(prompt) + len(response) - 1] = True
    return ids, attention, predicting


def align_responses(prompts: Sequence[Ids], responses: Sequence[Ids]) -> tuple[Tensor, Tensor, Tensor]:
    """Prompts with responses -> ids, attention mask (batch, seq), and response mask (batch, longest response).

    All responses start in one column. With n tokens in the longest response, the logits of columns -n - 1 to -2
    predict them.
    """
    prompt_width, response_width = max(map(len, prompts)), max(map(len, responses))
    rows = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
    starts = [prompt_width - len(prompt) for prompt in prompts]
    ids, attention = _pad(rows, starts, prompt_width + response_width)
    return ids, attention, attention[:, prompt_width:].bool()


def _pad(rows: Sequence[Ids], starts: Sequence[int], width: int) -> tuple[Tensor, Tensor]:
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
        ids[i, start : start + len(row)] = torch.tensor(row)
        mask[i, start : start + len(row)] = 1
    return ids, mask
