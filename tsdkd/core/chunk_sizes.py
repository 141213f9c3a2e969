"""How many tokens the chunked objective works on at a time."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK_BYTES = {"cpu": 160_000_000, "cuda": 2**29}
"""Student logits that are formed at a time: enough rows for matrix products to run at full speed."""
TEACHER_CHUNKS = 2
"""Teacher chunks per chunk: they may be smaller, because one of a token's four products is the teacher's."""
BLOCK_LOGITS = {"cpu": 2**18, "cuda": 2**24}
"""Logits of a chunk that are worked on at a time in float32: on a CPU for each thread, in the cache of its core."""
TOKEN_STEP = 64
"""Chunks are multiples of it, which suits matrix products, and never smaller, however little memory is free: products
of fewer tokens wait for the head's weights."""


@dataclass(frozen=True, slots=True)
class ChunkSizes:
    """Numbers of tokens."""

    chunk: int
    """Tokens of one matrix product of the student."""
    teacher_chunk: int
    """Tokens of one matrix product of the teacher, within a chunk."""
    block: int
    """Tokens whose distributions exist at a time, within a teacher chunk."""
    indirect_block: int
    """Tokens whose candidates are ranked at a time: each gathers k rows of a head."""


def chunk_sizes(hidden: Tensor, vocab: int, k: int, teacher_width: int, chunk: int | None = None) -> ChunkSizes:
    """Sizes for the student's hidden states (tokens, width); `chunk` replaces the size that `chunk_tokens` gives."""
    tokens, width = hidden.shape
    chunk = chunk or chunk_tokens(hidden, vocab)
    threads = torch.get_num_threads() if hidden.device.type == "cpu" else 1
    logits = _for_device(BLOCK_LOGITS, hidden)
    return ChunkSizes(
        chunk=chunk,
        teacher_chunk=-(-chunk // TEACHER_CHUNKS),
        block=min(threads * max(1, logits // vocab), tokens),
        indirect_block=max(1, threads * logits // (k * max(width, teacher_width))),
    )


def chunk_tokens(hidden: Tensor, vocab: int) -> int:
    """Tokens of a chunk, so that chunks have nearly the same size.

    On CPUs it does not depend on free memory, so that two runs give the same bytes.
    """
    tokens, device = len(hidden), hidden.device
    available = _for_device(CHUNK_BYTES, hidden)
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        available = min(available, (torch.cuda.mem_get_info(device)[0] + cached) // 8)
    most_steps = max(1, available // (vocab * hidden.itemsize * TOKEN_STEP))
    steps = -(-tokens // TOKEN_STEP)
    return TOKEN_STEP * -(-steps // -(-steps // most_steps))


def slices(total: int, size: int) -> Iterator[slice]:
    """Slices of `size`, the last one smaller, that cover `range(total)`."""
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def _for_device(sizes: dict[str, int], hidden: Tensor) -> int:
    return sizes["cpu" if hidden.device.type == "cpu" else "cuda"]
