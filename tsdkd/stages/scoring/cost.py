"""What scoring costs: bytes on disk and tokens to read. Arithmetic on lengths; nothing is read or written here."""

from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from tsdkd.core import Head
from tsdkd.stages.batches import by_length, in_blocks
from tsdkd.stages.config import ScoreConfig
from tsdkd.stages.samples.signals import NEEDS_HEAD, bytes_per_token

BLOCK_BYTES = 2**30
"""Of scores that are read before they are written; two blocks are in memory at a time."""

MOST_PADDING = 0.1
"""Share of a batch; where lengths differ much, batches stay smaller than they may be."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Of scores on disk, before compression."""

    signal: str
    tokens: int
    """Response tokens."""
    bytes_per_token: int
    head_bytes: int
    """The teacher's head, written once."""

    @property
    def bytes(self) -> int:
        return self.tokens * self.bytes_per_token + self.head_bytes

    def rows(self) -> list[tuple[str, str]]:
        """Names and values for a person."""
        head = [("teacher's head, once", in_words(self.head_bytes))] if self.head_bytes else []
        return [
            ("response tokens", f"{self.tokens:,}"),
            (f"bytes per token ({self.signal})", f"{self.bytes_per_token:,}"),
            *head,
            ("total on disk", in_words(self.bytes)),
        ]


def cost(config: ScoreConfig, head: Head, tokens: int = 0) -> Cost:
    """Of so many response tokens; of the teacher's head only shape and dtype matter."""
    weight = head.cut.weight
    per_token = bytes_per_token(config, weight.shape[1], weight.dtype)
    return Cost(config.signal, tokens, per_token, weight.nbytes if config.signal in NEEDS_HEAD else 0)


@dataclass(frozen=True, slots=True)
class Load:
    """Tokens to be read."""

    tokens: int = 0
    """Of prompts and responses."""
    response_tokens: int = 0
    read: int = 0
    """Of prompts and responses, padding included."""

    def __add__(self, other: "Load") -> "Load":
        return Load(self.tokens + other.tokens, self.response_tokens + other.response_tokens, self.read + other.read)

    @property
    def padding(self) -> float:
        """Share of what is read."""
        return 1 - self.tokens / self.read


def workload(table: pa.Table, config: ScoreConfig, head: Head) -> Load:
    """Of a part of rollouts, in the batches that score makes of it."""
    found, (_, responses) = lengths(table), _lengths(table)
    read = sum(
        len(batch) * found[batch[0]] for block in blocks(table, config, head) for batch in batches(found, block, config)
    )
    return Load(sum(found), sum(responses), read)


def blocks(table: pa.Table, config: ScoreConfig, head: Head) -> Iterator[range]:
    """Rows of a part of rollouts, in order, whose scores take at most `BLOCK_BYTES`."""
    per_token = cost(config, head).bytes_per_token
    return in_blocks([per_token * length for length in _lengths(table)[1]], BLOCK_BYTES)


def batches(lengths: list[int], block: range, config: ScoreConfig) -> Iterator[list[int]]:
    """Rows of a block that are read together."""
    sizes = lengths[block.start : block.stop]
    for batch in by_length(sizes, tokens=config.batch_tokens, padding=MOST_PADDING):
        yield [block[i] for i in batch]


def lengths(table: pa.Table) -> list[int]:
    """Tokens of each prompt with its response."""
    return [prompt + response for prompt, response in zip(*_lengths(table), strict=True)]


def _lengths(table: pa.Table) -> tuple[list[int], list[int]]:
    """Tokens of prompts, and of responses."""
    prompts, responses = (pc.list_value_length(table[name]).to_pylist() for name in ("prompt_ids", "response_ids"))
    return prompts, responses


def in_words(size: int) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e7 else f"{size / 1e6:,.2f} MB"
