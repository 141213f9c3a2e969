"""Batches of similar length, and token ids padded to tensors. The padding id is 0; masks exclude it everywhere."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from tsdkd.stages.models.load import LanguageModel, position_ids

Ids = Sequence[int]
Batch = dict[str, Any]
"""Samples as tensors: those of `join_sequences`, and "recorded", the scores' columns (tokens, ...) by name."""


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


def join_sequences(prompts: Sequence[Ids], responses: Sequence[Ids], turns: Sequence[Sequence[range]]) -> Batch:
    """Prompts with responses and the turns of each response -> the inputs of a forward pass and of the objective.

    "input_ids", "attention_mask", "position_ids" (batch, seq): sequences start in the first column, which needs the
    least padding. "predicting" (batch, seq): True where a position predicts a token of a turn. "response_mask"
    (turns, longest turn): True at a turn's tokens; the objective takes each turn as a response.
    """
    ids, attention = pad_right([[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)])
    predicting = torch.zeros_like(ids, dtype=torch.bool)
    for row, prompt, ranges in zip(predicting, prompts, turns, strict=True):
        for turn in ranges:
            row[len(prompt) - 1 + turn.start : len(prompt) - 1 + turn.stop] = True
    lengths = torch.tensor([len(turn) for ranges in turns for turn in ranges])
    return {
        "input_ids": ids,
        "attention_mask": attention,
        "position_ids": position_ids(attention),
        "predicting": predicting,
        "response_mask": torch.arange(int(lengths.max())) < lengths.unsqueeze(-1),
    }


def predicted_ids(batch: Batch) -> Tensor:
    """The ids of the tokens that a batch's predicting positions predict (tokens,)."""
    ids: Tensor = batch["input_ids"][:, 1:][batch["predicting"][:, :-1]]
    return ids


def predicting_hidden(language_model: LanguageModel, batch: Batch) -> Tensor:
    """The hidden states of a batch's predicting positions (tokens, width), on the model's device."""
    names = ("input_ids", "attention_mask", "position_ids")
    hidden = language_model.hidden(*(batch[name].to(language_model.device) for name in names))
    return hidden[batch["predicting"].to(hidden.device)]


def _pad(rows: Sequence[Ids], starts: Sequence[int], width: int) -> tuple[Tensor, Tensor]:
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
        ids[i, start : start + len(row)] = torch.tensor(row)
        mask[i, start : start + len(row)] = 1
    return ids, mask
