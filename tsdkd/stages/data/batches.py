"""Batches of sequences, and their token ids as tensors: padded, or packed into one row without padding.

The padding id is 0; masks exclude it everywhere.
"""

from collections.abc import Iterator, Sequence
from math import ceil
from typing import Any

import torch
from torch import Tensor

from tsdkd.stages.models.language_model import LanguageModel, packed_lengths, position_ids

Ids = Sequence[int]
Batch = dict[str, Any]
"""Samples as tensors: those of `join_sequences`, and "recorded", the scores' columns (tokens, ...) by name."""


def batches_by_length(
    lengths: Sequence[int], *, size: int | None = None, tokens: int | None = None
) -> Iterator[list[int]]:
    """Indices of sequences in batches of similar length, longest first, so that memory peaks in the first batch.

    A batch holds at most `size` sequences and at most `tokens` tokens, padding included, but at least one sequence.
    """
    batch: list[int] = []
    for index in _longest_first(lengths):
        full = len(batch) == size or (tokens and batch and lengths[batch[0]] * (len(batch) + 1) > tokens)
        if batch and full:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def packed_batches(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Indices of sequences in batches of at most `tokens` tokens, longest first; a longer sequence is alone."""
    order = _longest_first(lengths)
    for block in consecutive_blocks([lengths[i] for i in order], tokens):
        yield [order[i] for i in block]


def even_batches(lengths: Sequence[int], tokens: int, ranks: int) -> list[list[int]]:
    """Indices of sequences in batches of about equal numbers of tokens, at most `tokens`, for packing.

    The number of batches is a multiple of `ranks`; some may be empty. No sequence may be longer than `tokens`.
    """
    for rounds in range(max(1, ceil(sum(lengths) / (tokens * ranks))), len(lengths) + 1):
        batches: list[list[int]] = [[] for _ in range(rounds * ranks)]
        sizes = [0] * len(batches)
        for index in _longest_first(lengths):
            smallest = sizes.index(min(sizes))
            batches[smallest].append(index)
            sizes[smallest] += lengths[index]
        if max(sizes) <= tokens:
            return batches
    raise ValueError(f"a sequence is longer than {tokens} tokens")


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))


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


def join_sequences(
    prompts: Sequence[Ids], responses: Sequence[Ids], turns: Sequence[Sequence[range]], *, packed: bool = False
) -> Batch:
    """Prompts with responses and the turns of each response -> the inputs of a forward pass and of the objective.

    "input_ids", "attention_mask", "position_ids" (batch, seq): sequences start in the first column, which needs the
    least padding. "predicting" (batch, seq): True where a position predicts a token of a turn. "response_mask"
    (turns, longest turn): True at a turn's tokens; the objective takes each turn as a response.

    `packed`: one row holds all sequences without padding; their positions start at 0, and the attention mask is None.
    """
    ids, attention = pad_right([[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)])
    predicting = torch.zeros_like(ids, dtype=torch.bool)
    for row, prompt, ranges in zip(predicting, prompts, turns, strict=True):
        for turn in ranges:
            row[len(prompt) - 1 + turn.start : len(prompt) - 1 + turn.stop] = True
    lengths = torch.tensor([len(turn) for ranges in turns for turn in ranges])
    inputs = {"input_ids": ids, "position_ids": position_ids(attention), "predicting": predicting}
    if packed:
        inputs = {name: value[attention.bool()].unsqueeze(0) for name, value in inputs.items()}
    return {
        **inputs,
        "attention_mask": None if packed else attention,
        "response_mask": torch.arange(int(lengths.max())) < lengths.unsqueeze(-1),
    }


def predicted_ids(batch: Batch) -> Tensor:
    """The ids of the tokens that a batch's predicting positions predict (tokens,)."""
    ids: Tensor = batch["input_ids"][:, 1:][batch["predicting"][:, :-1]]
    return ids


def predicting_hidden(language_model: LanguageModel, batch: Batch) -> Tensor:
    """The hidden states of a batch's predicting positions (tokens, width), on the model's device.

    A model that cannot read packed batches reads the sequences of one in padded batches of as many tokens.
    """
    device = language_model.device
    if batch["attention_mask"] is None and language_model.packing_problem:
        return _padded_predicting_hidden(language_model, batch)
    mask = batch["attention_mask"]
    mask = mask if mask is None else mask.to(device)
    hidden = language_model.hidden(batch["input_ids"].to(device), mask, batch["position_ids"].to(device))
    return hidden[batch["predicting"].to(hidden.device)]


def _padded_predicting_hidden(language_model: LanguageModel, batch: Batch) -> Tensor:
    lengths = packed_lengths(batch["position_ids"])
    ids, predicting = (batch[name][0].split(lengths) for name in ("input_ids", "predicting"))
    by_sequence: dict[int, Tensor] = {}
    for indices in batches_by_length(lengths, tokens=sum(lengths)):
        rows, mask = (value.to(language_model.device) for value in pad_right([ids[i].tolist() for i in indices]))
        hidden = language_model.hidden(rows, mask)
        for i, row in zip(indices, hidden, strict=True):
            by_sequence[i] = row[: lengths[i]][predicting[i].to(row.device)]
    return torch.cat([by_sequence[i] for i in range(len(lengths))])


def _pad(rows: Sequence[Ids], starts: Sequence[int], width: int) -> tuple[Tensor, Tensor]:
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
        ids[i, start : start + len(row)] = torch.tensor(row)
        mask[i, start : start + len(row)] = 1
    return ids, mask
