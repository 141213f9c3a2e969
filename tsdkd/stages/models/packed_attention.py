"""Attention within each sequence of a packed batch: sequences side by side in one row, without padding.

Flash attention has kernels of variable length. Other implementations are replaced by a loop over the sequences with
PyTorch's fused attention, so that no matrix of all pairs of tokens exists.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import dropout as drop
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig

from tsdkd.stages.models.attributes import replaced_attribute

PACKED = "tsdkd_packed"
"""The name of this module's attention among transformers' implementations."""
BLOCK = 512
"""Queries whose scores exist at a time where attention has a window, a soft-cap or sinks."""

_lengths: ContextVar[Sequence[int]] = ContextVar("lengths of the sequences of a packed batch")


@dataclass(frozen=True)
class PackedMask:
    """In place of a mask tensor: which keys the queries of a packed batch read.

    Layers get it as an argument, so the second forward of gradient checkpointing has it too.
    """

    pieces: tuple[int, ...]
    """The lengths of consecutive pieces; queries read keys of their own piece, up to their own position."""
    window: int | None
    """The number of latest keys that a query reads; None: all."""


@contextmanager
def packed_sequences(
    config: PreTrainedConfig, lengths: Sequence[int], device: torch.device
) -> Iterator[dict[str, Any]]:
    """Inside, a model with this config reads a row of sequences of these lengths; yields arguments of its forward."""
    if has_packed_kernels(config):
        ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)
        longest = max(lengths)
        yield {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
        return
    token = _lengths.set(lengths)
    try:
        with replaced_attribute(config, "_attn_implementation", PACKED):
            yield {}
    finally:
        _lengths.reset(token)


def training_attention(config: PreTrainedConfig) -> str:
    """The implementation under which a model trains on packed batches; a backward pass may call it again."""
    return str(config._attn_implementation) if has_packed_kernels(config) else PACKED  # noqa: SLF001


def has_packed_kernels(config: PreTrainedConfig) -> bool:
    """Whether the model's attention implementation has kernels for packed sequences."""
    return "flash" in str(config._attn_implementation)  # noqa: SLF001  # transformers has no other name


def packed_mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Tensor],
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **_: Any,
) -> PackedMask:
    """The mask of a packed batch; a mask function of transformers' `AttentionMaskInterface`.

    `local_size`: the window of sliding or chunked attention, which `mask_function` tells apart. Raises
    NotImplementedError for other masks, such as bidirectional ones.
    """
    lengths = tuple(_lengths.get())
    if use_vmap or attention_mask is not None or (batch_size, q_length, kv_length) != (1, sum(lengths), sum(lengths)):
        raise NotImplementedError("the model makes a mask of its own")
    longest, index = max(lengths), torch.arange(q_length, device=device)
    sequence = torch.arange(len(lengths), device=device).repeat_interleave(torch.tensor(lengths, device=device))
    first = index.new_zeros(())

    def reads(distance: int) -> tuple[Tensor, Tensor]:
        """Queries with a key of their sequence at a distance before them, and whether they read it."""
        query = index[distance:] if distance > 0 else index[:distance]
        key = query - distance
        same = sequence[query] == sequence[key]
        return query[same], mask_function(first, first, query, key)[same]

    query, previous = reads(1)
    if longest > 1 and reads(-1)[1].any():
        raise NotImplementedError("the model reads later tokens")
    if previous.all():
        if local_size is None or longest <= local_size:
            return PackedMask(lengths, None)
        if not reads(local_size)[1].any() and reads(local_size - 1)[1].all():
            return PackedMask(lengths, local_size)
    elif local_size and torch.equal(previous, query % local_size != 0):  # chunks, counted from the row's start
        return PackedMask(tuple(piece for length in lengths for piece in _chunks(length, local_size)), None)
    raise NotImplementedError("the model has an unknown attention mask")


def _chunks(length: int, size: int) -> list[int]:
    return [min(size, length - start) for start in range(0, length, size)]


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: PackedMask,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers' `AttentionInterface`: (1, heads, seq, width) -> (1, seq, heads, width).

    `s_aux`: attention sinks (heads,). `check_attention`'s comparison finds features that it does not have.
    """
    if not isinstance(attention_mask, PackedMask):
        raise NotImplementedError("the model makes a mask of its own")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    fused = softcap is None and s_aux is None
    attend: Callable[..., Tensor] = partial(_fused, dropout=dropout, scale=scale)
    if not fused:
        attend = partial(_recomputed, dropout=dropout, scale=scale, softcap=softcap, sinks=s_aux)
    width = value.shape[-1]
    value = pad(value, (0, query.shape[-1] - width))  # fused kernels need values as wide as keys
    queries, keys, values = (tensor.split(attention_mask.pieces, dim=2) for tensor in (query, key, value))
    results: list[Tensor] = []
    for piece, length in enumerate(attention_mask.pieces):
        tensors, window = (queries[piece], keys[piece], values[piece]), attention_mask.window or length
        if fused and window >= length:
            results.append(attend(*tensors, None))
        else:
            results += [attend(*block) for block in _blocks(*tensors, window)]
    return torch.cat([result[..., :width].transpose(1, 2) for result in results], dim=1), None


def _blocks(query: Tensor, key: Tensor, value: Tensor, window: int) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Consecutive queries, the keys and values that they read, and the mask (queries, keys)."""
    length = query.shape[2]
    for start in range(0, length, BLOCK):
        stop, first = min(start + BLOCK, length), max(0, start - window + 1)
        distance = torch.arange(start, stop, device=query.device).unsqueeze(-1)
        distance = distance - torch.arange(first, stop, device=query.device)
        mask = (distance >= 0) & (distance < window)
        yield query[:, :, start:stop], key[:, :, first:stop], value[:, :, first:stop], mask


def _fused(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, dropout: float, scale: float) -> Tensor:
    """Without a mask, queries read the keys up to their own position."""
    groups = query.shape[1] // key.shape[1]
    if mask is not None:  # fused kernels of GPUs have either a mask or grouped heads
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    return scaled_dot_product_attention(
        query, key, value, mask, dropout, is_causal=mask is None, scale=scale, enable_gqa=mask is None and groups > 1
    )


def _recomputed(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **settings: Any) -> Tensor:
    """Attention with a soft-cap or sinks, which fused kernels do not have; the backward computes scores again."""
    if torch.is_grad_enabled() and query.requires_grad:
        again: Tensor = checkpoint(_unfused, query, key, value, mask, use_reentrant=False, **settings)
        return again
    return _unfused(query, key, value, mask, **settings)


def _unfused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    *,
    dropout: float,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    heads, queries = query.shape[1:3]
    grouped = query.unflatten(1, (key.shape[1], -1))  # (1, key heads, groups, queries, width)
    scores = (grouped.flatten(2, 3) @ key.transpose(2, 3)).unflatten(2, grouped.shape[2:4]) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if sinks is not None:
        column = sinks.view(*grouped.shape[1:3], 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, column.to(scores.dtype)], -1)
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)[..., : key.shape[2]]
    weights = drop(weights, dropout)
    return (weights.flatten(2, 3) @ value).view(1, heads, queries, -1)


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, packed_mask)
