"""Reads rollouts and scores of one response, or streams the light columns of all responses.

Files are not hashed, so that inspecting one response of a large artifact reads one row group.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from tsdkd.artifacts.files import rollouts_table
from tsdkd.artifacts.manifest import ModelRecord, Part, teacher_role
from tsdkd.artifacts.reader import Artifact, read_artifact
from tsdkd.artifacts.tables import teacher_of
from tsdkd.errors import ArtifactError, InputError
from tsdkd.stages.data.turns import Mask, turn_lengths
from tsdkd.stages.inspect.numpy_selection import Array, split_turns

Rollout = dict[str, Any]
ENTROPY_COLUMNS = ("student_entropy", "teacher_entropy")
ROLLOUT_COLUMNS = ["sample_id", "messages", "prompt_ids", "response_ids", "response_mask", "finish_reason", "author"]
MasksOf = Callable[[str], Mapping[str, Mask]]
"""A table of the rollouts -> the masks of its responses by sample; a response without one is a single turn."""
STREAMED_ROWS = 64
"""Responses per `ColumnBatch`."""


@dataclass(frozen=True, slots=True)
class ResponseScores:
    """The scores of one response."""

    student_entropy: Array
    """Nats, (tokens,)."""
    teacher_entropy: Array
    """Nats, (tokens,)."""
    candidates: Array
    """Token ids that the student proposes, most likely first: (tokens, k)."""
    ranks: Array
    """The teacher's rank of each candidate, 0 is the most likely: (tokens, k)."""


@dataclass(frozen=True, slots=True)
class ColumnBatch:
    """Columns of several responses; the tokens of all responses are concatenated."""

    sample_ids: list[str]
    turns: list[list[int]]
    """Tokens of each turn, by response."""
    columns: dict[str, Array]

    def split(self, values: Array) -> list[Array]:
        """Split values of all tokens by turn."""
        return split_turns(values, [length for lengths in self.turns for length in lengths])


@dataclass(frozen=True, slots=True)
class RolloutsReader:
    """Reads rollouts by their row number in the artifact."""

    artifact: Artifact

    def __len__(self) -> int:
        return self.artifact.manifest.rows

    def index_of(self, sample_id: str) -> int:
        """The row number of a rollout. Raises InputError, naming existing ids, for an unknown one."""
        rows_before, examples = 0, list[str]()
        for part in self.artifact.tables:
            ids = self.artifact.read_part(part, ["sample_id"])["sample_id"]
            index = int(pc.index(ids, sample_id).as_py())
            if index >= 0:
                return rows_before + index
            rows_before, examples = rows_before + len(ids), examples or ids[:3].to_pylist()
        raise InputError(
            f"{self.artifact.path} has no response {sample_id}.", f"Name another, such as {', '.join(examples)}."
        )

    def masks(self, table: str) -> dict[str, Mask]:
        """The masks of the responses of one table, by sample."""
        columns = ["sample_id", "response_mask"]
        rows = self.artifact.read_part(self.artifact.table_part(table), columns)
        return dict(zip(*(rows[name].to_pylist() for name in columns), strict=True))

    def __getitem__(self, index: int) -> Rollout:
        part, row = _locate_row(self.artifact, index)
        rollout: Rollout = self.artifact.read_part(part, ROLLOUT_COLUMNS).slice(row, 1).to_pylist()[0]
        return rollout


@dataclass(frozen=True)
class ScoresReader:
    """Reads scores by the sample ids of the rollouts."""

    artifact: Artifact

    @cached_property
    def _locations(self) -> dict[str, tuple[Part, int]]:
        """The part of each response, and its row there."""
        return {
            sample_id: (part, row)
            for part in self.artifact.tables
            for row, sample_id in enumerate(self.artifact.read_part(part, ["sample_id"])["sample_id"].to_pylist())
        }

    @property
    def k(self) -> int:
        """Candidates per token."""
        return int(self.artifact.manifest.config["k"])

    def __len__(self) -> int:
        return self.artifact.manifest.rows

    def model(self, role: str) -> ModelRecord:
        return self.artifact.manifest.model(role)

    def teacher(self, sample_id: str) -> ModelRecord:
        """The teacher that read a response."""
        part, _ = self._find(sample_id)
        manifest = self.artifact.manifest
        return manifest.model(teacher_role(teacher_of(self.artifact.path, manifest, part.file)))

    def teacher_name(self, sample_id: str) -> str:
        """The name of the teacher that read a response; "" for an only teacher."""
        return self.teacher(sample_id).teacher_name or ""

    def _find(self, sample_id: str) -> tuple[Part, int]:
        if sample_id in self._locations:
            return self._locations[sample_id]
        raise ArtifactError(
            f"{self.artifact.path} has no scores of {sample_id}.", "Run `tsdkd score` again with --overwrite."
        )

    def __getitem__(self, sample_id: str) -> ResponseScores:
        part, row = self._find(sample_id)
        with self.artifact.open_part(part) as file:
            table = file.read_row_group(row, columns=[*ENTROPY_COLUMNS, "candidates", "ranks"])
        self.artifact.check(part, table)
        return ResponseScores(
            *(_flatten(table[name]) for name in ENTROPY_COLUMNS),
            *(_flatten(table[name]).reshape(-1, self.k) for name in ("candidates", "ranks")),
        )

    def stream(self, columns: list[str], masks_of: MasksOf) -> Iterator[ColumnBatch]:
        """All responses in the order of the scores, `STREAMED_ROWS` at a time."""
        for part in self.artifact.tables:
            masks = masks_of(rollouts_table(part.file))
            with self.artifact.open_part(part) as file:
                for batch in file.iter_batches(STREAMED_ROWS, columns=["sample_id", *columns], use_threads=False):
                    self.artifact.check(part, pa.Table.from_batches([batch]))
                    sample_ids = batch.column("sample_id").to_pylist()
                    lengths = batch.column(columns[0]).value_lengths().to_pylist()
                    turns = [turn_lengths(n, masks.get(i)) for i, n in zip(sample_ids, lengths, strict=True)]
                    values = {name: batch.column(name).flatten().to_numpy() for name in columns}
                    yield ColumnBatch(sample_ids, turns, values)


def open_scores(scores: Path, rollouts: Path | None = None) -> tuple[RolloutsReader, ScoresReader]:
    """Scores and the rollouts they were made from; `rollouts` None: at the recorded path. Raises ArtifactError."""
    scores_artifact = read_artifact(scores, "scores", hashed=False)
    recorded = next((scores / p.path for p in scores_artifact.manifest.parents if p.kind == "rollouts"), Path())
    rollouts_artifact = read_artifact(rollouts or recorded, "rollouts", "--rollouts", hashed=False)
    scores_artifact.require_parent(rollouts_artifact)
    if rollouts_artifact.manifest.rows != scores_artifact.manifest.rows:
        raise ArtifactError(
            f"{scores} and {rollouts_artifact.path} have different numbers of rows.",
            "Run `tsdkd score` again with --overwrite.",
        )
    return RolloutsReader(rollouts_artifact), ScoresReader(scores_artifact)


def _locate_row(artifact: Artifact, index: int) -> tuple[Part, int]:
    """The part that holds a row, and the row's number in it."""
    for part in artifact.tables:
        if index < (part.rows or 0):
            return part, index
        index -= part.rows or 0
    raise IndexError(index)


def _flatten(column: pa.ChunkedArray) -> Array:
    values: Array = column.combine_chunks().flatten().to_numpy()  # ChunkedArray.to_numpy would import pandas
    return values
