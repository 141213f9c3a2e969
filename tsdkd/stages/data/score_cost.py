"""What scoring costs: bytes on disk and tokens to read. Arithmetic on lengths; nothing is read or written here."""

from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from tsdkd.core import Head
from tsdkd.stages.config.score import ScoreConfig
from tsdkd.stages.data.batches import batches_by_length, consecutive_blocks
from tsdkd.stages.data.teacher_signals import SIGNALS_WITH_HEAD, bytes_per_token

BLOCK_BYTES = 2**30
"""Of scores that are read before they are written; two blocks are in memory at a time."""

MOST_PADDING = 0.1
"""Share of a batch; where lengths differ much, batches stay smaller than they may be."""


@dataclass(frozen=True, slots=True)
class ScoreCost:
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
        head = [("teacher's head, once", format_bytes(self.head_bytes))] if self.head_bytes else []
        return [
            ("response tokens", f"{self.tokens:,}"),
            (f"bytes per token ({self.signal})", f"{self.bytes_per_token:,}"),
            *head,
            ("total on disk", format_bytes(self.bytes)),
        ]


def score_cost(config: ScoreConfig, head: Head, tokens: int = 0) -> ScoreCost:
    """Of so many response tokens; of the teacher's head only shape and dtype matter."""
    weight = head.cut.weight
    per_token = bytes_per_token(config, weight.shape[1], weight.dtype)
    return ScoreCost(config.signal, tokens, per_token, weight.nbytes if config.signal in SIGNALS_WITH_HEAD else 0)


@dataclass(frozen=True, slots=True)
class ScoreWorkload:
    """Tokens to be read."""

    tokens: int = 0
    """Of prompts and responses."""
    response_tokens: int = 0
    read: int = 0
    """Of prompts and responses, padding included."""

    def __add__(self, other: "ScoreWorkload") -> "ScoreWorkload":
        return ScoreWorkload(
            self.tokens + other.tokens, self.response_tokens + other.response_tokens, self.read + other.read
        )

    @property
    def padding(self) -> float:
        """Share of what is read."""
        return 1 - self.tokens / self.read


def score_workload(table: pa.Table, config: ScoreConfig, head: Head) -> ScoreWorkload:
    """Of a part of rollouts, in the batches that score makes of it."""
    found, (_, responses) = sequence_lengths(table), _lengths(table)
    read = sum(
        len(batch) * found[batch[0]]
        for block in score_blocks(table, config, head)
        for batch in score_batches(found, block, config)
    )
    return ScoreWorkload(sum(found), sum(responses), read)


def score_blocks(table: pa.Table, config: ScoreConfig, head: Head) -> Iterator[range]:
    """Rows of a part of rollouts, in order, whose scores take at most `BLOCK_BYTES`."""
    per_token = score_cost(config, head).bytes_per_token
    return consecutive_blocks([per_token * length for length in _lengths(table)[1]], BLOCK_BYTES)


def score_batches(lengths: list[int], block: range, config: ScoreConfig) -> Iterator[list[int]]:
    """Rows of a block that are read together."""
    sizes = lengths[block.start : block.stop]
    for batch in batches_by_length(sizes, tokens=config.batch_tokens, padding=MOST_PADDING):
        yield [block[i] for i in batch]


def sequence_lengths(table: pa.Table) -> list[int]:
    """Tokens of each prompt with its response."""
    return [prompt + response for prompt, response in zip(*_lengths(table), strict=True)]


def _lengths(table: pa.Table) -> tuple[list[int], list[int]]:
    """Tokens of prompts, and of responses."""
    prompts, responses = (pc.list_value_length(table[name]).to_pylist() for name in ("prompt_ids", "response_ids"))
    return prompts, responses


def format_bytes(size: int) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e7 else f"{size / 1e6:,.2f} MB"
