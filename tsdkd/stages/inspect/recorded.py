"""Rows of rollouts and of their scores, read where they lie: one response, or the light columns of all, part by part.

Nothing is hashed: to look at one response, terabytes need not be read.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tsdkd.artifacts.manifest import ModelRecord
from tsdkd.artifacts.reader import Artifact, read_artifact
from tsdkd.errors import ArtifactError, InputError
from tsdkd.stages.inspect.selection import Array

Row = dict[str, Any]
ENTROPIES = ("student_entropy", "teacher_entropy")
TOLD = ["sample_id", "messages", "prompt_ids", "response_ids", "finish_reason", "author"]
ROWS_AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class RecordedView:
    """What a student and the teacher see in a response; arrays run over its tokens."""

    student_entropy: Array
    teacher_entropy: Array
    candidates: Array
    """The student's, best first: ids (tokens, k)."""
    ranks: Array
    """The teacher's rank of each, 0 is its favourite: (tokens, k)."""


@dataclass(frozen=True, slots=True)
class ColumnBatch:
    """Columns of some responses, one response's tokens after the other's."""

    lengths: Array
    """Tokens of each response."""
    columns: dict[str, Array]

    def split(self, values: Array) -> list[Array]:
        """Values of all tokens -> those of each response."""
        return np.split(values, self.lengths.cumsum()[:-1])


@dataclass(frozen=True, slots=True)
class RecordedRollouts:
    """Responses by their place in the artifact."""

    artifact: Artifact

    def __len__(self) -> int:
        return self.artifact.manifest.rows

    def find(self, sample_id: str) -> int:
        """Raises InputError, naming a few that exist."""
        before, some = 0, list[str]()
        for part in self.artifact.tables:
            with _opened(self.artifact, part.file) as file:
                ids = file.read(columns=["sample_id"])["sample_id"]
            found = int(pc.index(ids, sample_id).as_py())
            if found >= 0:
                return before + found
            before, some = before + len(ids), some or ids[:3].to_pylist()
        raise InputError(
            f"{self.artifact.path} has no response {sample_id}.", f"Name another, such as {', '.join(some)}."
        )

    def __getitem__(self, index: int) -> Row:
        file_name, row = _place(self.artifact, index)
        with _opened(self.artifact, file_name) as file:
            found: Row = file.read(columns=TOLD).slice(row, 1).to_pylist()[0]
        return found


@dataclass(frozen=True, slots=True)
class RecordedScores:
    """What was recorded of each response, at the same place as in the rollouts."""

    artifact: Artifact

    @property
    def k(self) -> int:
        return int(self.artifact.manifest.config["k"])

    def __len__(self) -> int:
        return self.artifact.manifest.rows

    def model(self, role: str) -> ModelRecord:
        return self.artifact.manifest.model(role)

    def __getitem__(self, index: int) -> RecordedView:
        file_name, row = _place(self.artifact, index)
        with _opened(self.artifact, file_name) as file:
            table = file.read_row_group(row, columns=[*ENTROPIES, "candidates", "ranks"])
        return RecordedView(
            *(_flat(table[name]) for name in ENTROPIES), *(self._by_k(table[n]) for n in ("candidates", "ranks"))
        )

    def stream(self, columns: list[str]) -> Iterator[ColumnBatch]:
        """All responses in order, a few at a time."""
        for part in self.artifact.tables:
            with _opened(self.artifact, part.file) as file:
                for batch in file.iter_batches(ROWS_AT_ONCE, columns=columns, use_threads=False):
                    lengths = batch.column(columns[0]).value_lengths().to_numpy()
                    yield ColumnBatch(lengths, {name: batch.column(name).flatten().to_numpy() for name in columns})

    def _by_k(self, column: pa.ChunkedArray) -> Array:
        return _flat(column).reshape(-1, self.k)


def open_recorded(scores: Path, rollouts: Path | None = None) -> tuple[RecordedRollouts, RecordedScores]:
    """Scores with the rollouts they were made from, by default where they lay then. Raises ArtifactError."""
    scored = read_artifact(scores, "scores", hashed=False)
    (parent,) = scored.manifest.parents
    answered = read_artifact(rollouts or scores / parent.path, "rollouts", "--rollouts", hashed=False)
    scored.require_parent(answered)
    return RecordedRollouts(answered), RecordedScores(scored)


def _place(artifact: Artifact, index: int) -> tuple[str, int]:
    for part in artifact.tables:
        if index < (part.rows or 0):
            return part.file, index
        index -= part.rows or 0
    raise IndexError(index)


@contextmanager
def _opened(artifact: Artifact, file: str) -> Iterator[pq.ParquetFile]:
    try:
        with pq.ParquetFile(artifact.path / file) as opened:
            yield opened
    except (OSError, pa.ArrowException) as error:
        raise ArtifactError(
            f"{artifact.path / file} cannot be read ({str(error).splitlines()[0]}).",
            f"`tsdkd artifact verify {artifact.path}` tells what is wrong with it.",
        ) from None


def _flat(column: pa.ChunkedArray) -> Array:
    values: Array = column.combine_chunks().flatten().to_numpy()  # numpy's own way would import pandas
    return values
