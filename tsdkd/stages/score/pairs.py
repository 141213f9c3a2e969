"""The pair of the student and one teacher, which scores responses; the teacher is loaded, or behind a server."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import Protocol

import pyarrow as pa
import torch

from tsdkd.core import Head
from tsdkd.stages.config.score import ScoreConfig
from tsdkd.stages.data.rollout_lengths import sequence_lengths
from tsdkd.stages.data.score_cost import score_batches, score_blocks
from tsdkd.stages.data.scoring import (
    ModelPair,
    RolloutRow,
    ScoreRow,
    report_padded_reading,
    score_in_turn,
    score_responses,
)
from tsdkd.stages.data.served_scoring import (
    SERVED_COLUMNS,
    read_request,
    require_captured_mass,
    student_scores,
    teacher_columns,
)
from tsdkd.stages.models.language_model import LanguageModel
from tsdkd.stages.models.load import load_model
from tsdkd.stages.observer import Observer
from tsdkd.stages.teacher_server.server import TeacherServer

PROBE_TOKENS = 2048
"""Tokens of the batch that the rate of loaded models is measured on."""
NO_HEAD = Head(torch.empty(0, 0, device="meta"))
"""The head of a served teacher, whose size decides nothing here."""
Advance = Callable[[int], None]
"""Called with numbers of responses."""


class ScoringPair(Protocol):
    """The student and one teacher."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The optional columns of its rows."""

    @property
    def head(self) -> Head:
        """The teacher's."""

    def score(self, batches: Iterable[list[RolloutRow]], advance: Advance) -> Iterator[ScoreRow]:
        """The rows of scores of all batches, in order. Raises TsdkdError when a model fails."""

    def tokens_per_second(self, sample: pa.Table) -> float:
        """The rate, measured on rows of rollouts. Raises TsdkdError for a teacher that cannot be recorded."""


@dataclass(frozen=True, slots=True)
class LoadedPair:
    """Both models in memory, or read by vLLM."""

    models: ModelPair
    config: ScoreConfig
    columns: tuple[str, ...] = ()

    @property
    def head(self) -> Head:
        return self.models[1].head

    def score(self, batches: Iterable[list[RolloutRow]], advance: Advance) -> Iterator[ScoreRow]:
        for rows in score_in_turn(batches, self.models, self.config):
            advance(len(rows))
            yield from rows

    def tokens_per_second(self, sample: pa.Table) -> float:
        """The rate of one process on a small batch, after a warm-up of one sequence."""
        config = replace(self.config, batch_tokens=min(self.config.batch_tokens, PROBE_TOKENS))
        lengths = sequence_lengths(sample)
        batches = list(score_batches(lengths, range(len(lengths)), config))
        longest, shortest = batches[0], batches[-1]
        seconds = 0.0
        for batch in (shortest[:1], longest):  # the first call warms up
            start = time.perf_counter()
            score_responses(sample.take(batch).to_pylist(), self.models, config)
            seconds = time.perf_counter() - start
        return sum(lengths[i] for i in longest) / seconds


@dataclass(frozen=True, slots=True)
class ServedPair:
    """The student in memory, and a server that reads the sequences of a block together."""

    student: LanguageModel
    server: TeacherServer
    config: ScoreConfig
    columns: tuple[str, ...] = SERVED_COLUMNS

    @property
    def head(self) -> Head:
        return NO_HEAD

    def score(self, batches: Iterable[list[RolloutRow]], advance: Advance) -> Iterator[ScoreRow]:
        rollouts, rows = list[RolloutRow](), list[ScoreRow]()
        for batch in batches:
            rollouts += batch
            rows += student_scores(batch, self.student, self.config.k)
        requests = [read_request(rollout, row["candidates"]) for rollout, row in zip(rollouts, rows, strict=True)]
        for row, reading in zip(rows, self.server.read(requests, advance), strict=True):
            yield row | teacher_columns(reading, self.student.vocab, self.config)

    def tokens_per_second(self, sample: pa.Table) -> float:
        """Raises TsdkdError where the server's K tokens hold too little of the teacher's probability."""
        requests = [read_request(row) for row in sample.to_pylist()]
        start = time.perf_counter()
        require_captured_mass(self.server.read(requests), self.config.top_k)
        return sum(len(request.ids) for request in requests) / (time.perf_counter() - start)


def score_table_rows(
    pair: ScoringPair, table: pa.Table, config: ScoreConfig, advance: Advance
) -> Iterator[list[ScoreRow]]:
    """Yield the scores of rows of rollouts in order, block by block; a batch holds similar lengths of one block."""
    lengths = sequence_lengths(table)
    for block in score_blocks(table, config, pair.head):
        batches = list(score_batches(lengths, block, config))
        scored = pair.score((table.take(batch).to_pylist() for batch in batches), advance)
        rows = dict(zip(chain.from_iterable(batches), scored, strict=True))
        yield [rows[i] for i in block]


def load_reading_model(name: str, vocab: int, config: ScoreConfig, observer: Observer) -> LanguageModel:
    """A model that reads, cut to `vocab` ids. Raises InputError."""
    device_map = None if config.device_map == "one" else config.device_map
    model = load_model(name, config.dtype, device_map=device_map, attention=config.attention, observer=observer)
    model = replace(model, shared_vocab=vocab)
    report_padded_reading([model], observer)
    return model
