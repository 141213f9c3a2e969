"""The cost of scoring: bytes on disk and tokens that both models read, computed from lengths."""

from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa

from tsdkd.core import Head
from tsdkd.stages.config.score import ScoreConfig
from tsdkd.stages.data.batches import consecutive_blocks, packed_batches
from tsdkd.stages.data.rollout_lengths import sequence_lengths, trained_lengths
from tsdkd.stages.data.signal_storage import SIGNALS_WITH_HEAD, bytes_per_token

BLOCK_BYTES = 2**30
"""Bytes of the scores in one block, which is written as a unit. Memory holds two blocks."""


@dataclass(frozen=True, slots=True)
class ScoreCost:
    """Size of scores on disk, before compression."""

    signal: str
    tokens: int
    """Response tokens that are learned."""
    bytes_per_token: int
    head_bytes: int
    """The teacher's head; 0 for signals without it."""

    @property
    def bytes(self) -> int:
        return self.tokens * self.bytes_per_token + self.head_bytes

    def rows(self) -> list[tuple[str, str]]:
        """Labels and values of a table."""
        head = [("teacher's head, once", format_bytes(self.head_bytes))] if self.head_bytes else []
        return [
            ("response tokens", f"{self.tokens:,}"),
            (f"bytes per token ({self.signal})", f"{self.bytes_per_token:,}"),
            *head,
            ("total on disk", format_bytes(self.bytes)),
        ]


def score_cost(config: ScoreConfig, head: Head, tokens: int = 0) -> ScoreCost:
    """The cost of `tokens` response tokens. Only shape and dtype of the teacher's head matter."""
    weight = head.weight[: head.vocab_size]
    per_token = bytes_per_token(config, weight.shape[1], weight.dtype)
    return ScoreCost(config.signal, tokens, per_token, weight.nbytes if config.signal in SIGNALS_WITH_HEAD else 0)


@dataclass(frozen=True, slots=True)
class ScoreWorkload:
    """Tokens of one forward pass over prompts with their responses."""

    tokens: int = 0
    """Tokens of prompts and responses."""
    response_tokens: int = 0

    def __add__(self, other: "ScoreWorkload") -> "ScoreWorkload":
        return ScoreWorkload(self.tokens + other.tokens, self.response_tokens + other.response_tokens)


def score_workload(table: pa.Table) -> ScoreWorkload:
    """The workload of one part of the rollouts."""
    return ScoreWorkload(sum(sequence_lengths(table)), sum(trained_lengths(table)))


def score_blocks(table: pa.Table, config: ScoreConfig, head: Head) -> Iterator[range]:
    """Blocks of consecutive rows of one part of the rollouts; the scores of a block take at most `BLOCK_BYTES`."""
    per_token = score_cost(config, head).bytes_per_token
    return consecutive_blocks([per_token * length for length in trained_lengths(table)], BLOCK_BYTES)


def score_batches(lengths: list[int], block: range, config: ScoreConfig) -> Iterator[list[int]]:
    """Batches of a block's rows; `lengths` are the tokens of the part's sequences."""
    sizes = lengths[block.start : block.stop]
    for batch in packed_batches(sizes, config.batch_tokens):
        yield [block[i] for i in batch]


def format_bytes(size: int) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e7 else f"{size / 1e6:,.2f} MB"
