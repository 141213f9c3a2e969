"""Recorded samples: rollouts, with or without their scores, for offline training and held-out measurement."""

from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from accelerate.utils import send_to_device
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tsdkd.artifacts.files import HEAD_FILE, teacher_file, teacher_index
from tsdkd.artifacts.manifest import ModelRecord, Part
from tsdkd.artifacts.reader import Artifact, read_artifact
from tsdkd.artifacts.tables import check_hidden, limits_of, teacher_of, translate_arrow_errors
from tsdkd.core import TeacherSignal, TeacherTokens
from tsdkd.errors import ArtifactError, InputError
from tsdkd.stages.config.generate import GIVEN
from tsdkd.stages.data.batches import Batch, predicted_ids, predicting_hidden
from tsdkd.stages.data.provenance import Staleness
from tsdkd.stages.data.rollout_lengths import trained_lengths
from tsdkd.stages.data.signal_storage import SIGNALS_WITH_HEAD, SignalDecoder, load_head
from tsdkd.stages.data.source import COMPARED_TOKENS, Sample, ScoringSnapshot, collate
from tsdkd.stages.models.language_model import LanguageModel
from tsdkd.stages.models.spec import ModelSpec

TEACHER_END_IDS = "teacher_end_ids"
"""The key of the scores' configuration that lists the teacher's end tokens which are not the student's."""
MEASURED_ROWS, MEASURED_TOKENS = 32, 32_768
"""The most rows, and about the most tokens, that a student reads to measure how stale scores are."""
ROLLOUT_COLUMNS = [
    *("sample_id", "prompt_id", "prompt_ids", "author", "response_ids", "response_mask", "finish_reason", "teacher"),
]


class RolloutSource(torch.utils.data.Dataset[Sample]):
    """Sample i is row i of the rollouts. The teacher's signal is the response itself."""

    def __init__(self, rollouts: Path) -> None:
        """Raises ArtifactError if the rollouts are missing, broken or unfinished."""
        self.rollouts = read_artifact(rollouts, "rollouts")
        self._table = self.rollouts.table(ROLLOUT_COLUMNS)
        config = self.rollouts.manifest.config
        self.teacher_fraction = config["teacher_fraction"] if config["policy"] == "teacher-mixed" else 0.0

    @property
    def parents(self) -> tuple[Artifact, ...]:
        return (self.rollouts,)

    @property
    def teachers(self) -> tuple[ModelRecord, ...]:
        """Empty for given responses: the rollouts record no teacher that wrote them."""
        manifest = self.rollouts.manifest
        return () if manifest.config["policy"] == GIVEN else manifest.require_teachers()

    def shared_vocab(self, student: ModelSpec) -> int:
        """The number of ids that both student and teacher know."""
        return student.vocab

    def end_ids(self, tokenizer: PreTrainedTokenizerBase) -> set[int]:
        """Special tokens that end recorded responses, so that the student learns to end with them."""
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        ended = self._table.filter(pc.equal(self._table["finish_reason"], "stop"))["response_ids"]
        last = [lists.values.take(pc.subtract(lists.offsets[1:], 1)).unique() for lists in ended.chunks]
        return special & {i for ids in last for i in ids.to_pylist()}

    def __len__(self) -> int:
        return len(self._table)

    def prompt_ids(self, index: int) -> list[int]:
        return list(self._table["prompt_ids"][index].as_py())

    def length(self, index: int) -> int:
        """Tokens of a prompt with its response."""
        return len(self._table["prompt_ids"][index]) + len(self._table["response_ids"][index])

    def prompt_id(self, index: int) -> str:
        return str(self._table["prompt_id"][index].as_py())

    def __getitem__(self, index: int) -> Sample:
        return {name: self._table[name][index].as_py() for name in ROLLOUT_COLUMNS}

    def with_responses(
        self, samples: list[Sample], student: LanguageModel, key: Sequence[int], progress: float = 0.0
    ) -> list[Sample]:
        return samples

    def read_ahead(self, samples: list[Sample]) -> list[Sample]:
        return samples

    def recorded(self, samples: list[Sample]) -> dict[str, Tensor]:
        return {}

    def signal(self, batch: Batch) -> TeacherSignal:
        return TeacherTokens(predicted_ids(batch))

    def scoring_snapshot(self, batch: Batch) -> ScoringSnapshot | None:
        return None


class OfflineSource(RolloutSource):
    """Sample i is row i of the rollouts, with the name of the "teacher" that read it; `recorded` reads its scores."""

    def __init__(self, rollouts: Path, scores: Path) -> None:
        """Raises ArtifactError if either is missing, broken or unfinished, or the scores are of other rollouts."""
        super().__init__(rollouts)
        self.scores = read_artifact(scores, "scores")
        self.scores.require_parent(self.rollouts)
        self._teacher_of = {
            part.file: teacher_of(self.scores.path, self.scores.manifest, part.file) for part in self.scores.tables
        }
        self._limits = {
            part.file: limits_of(self.scores.path, self.scores.manifest, part.file) for part in self.scores.tables
        }
        self._rows = self._find_rows()
        self._decoder_on = lru_cache(maxsize=1)(self.decoder.to)
        self._open = lru_cache(maxsize=64)(lambda part: pq.ParquetFile(self.scores.path / part.file))

    def _find_rows(self) -> list[tuple[Part, int]]:
        """The part and the row group of the scores of each rollout.

        Checks all columns except the hidden states, one part in memory at a time. Raises ArtifactError unless the
        scores have one row for each rollout, as long as its response, in a row group of its own.
        """
        columns = ["sample_id", "teacher", *(name for name in self.decoder.columns if name != "hidden")]
        found: dict[str, tuple[int, Part, int]] = {}
        row_groups = 0
        for part in self.scores.tables:
            table = self.scores.read_part(part, columns)
            row_groups += pq.read_metadata(self.scores.path / part.file).num_row_groups
            lengths = pc.list_value_length(table["student_entropy"]).to_pylist()
            rows = zip(table["sample_id"].to_pylist(), lengths, strict=True)
            found |= {sample_id: (length, part, row) for row, (sample_id, length) in enumerate(rows)}
        wanted = self._table["sample_id"].to_pylist()
        matched = [found[sample_id] for sample_id in wanted if sample_id in found]
        same_rows = len(wanted) == len(found) == self.scores.manifest.rows == row_groups
        if not same_rows or [length for length, _, _ in matched] != trained_lengths(self._table):
            raise ArtifactError(
                f"{self.scores.path} has scores of other responses than those of {self.rollouts.path}.",
                "Run `tsdkd score` again with --overwrite.",
            )
        return [(part, row) for _, part, row in matched]

    @property
    def parents(self) -> tuple[Artifact, ...]:
        return (self.rollouts, self.scores)

    @property
    def teachers(self) -> tuple[ModelRecord, ...]:
        return self.scores.manifest.require_teachers()

    @cached_property
    def decoder(self) -> SignalDecoder:
        config, heads = self.scores.manifest.config, {}
        if config["signal"] in SIGNALS_WITH_HEAD:
            files = {teacher_file(HEAD_FILE, teacher_index(part)): name for part, name in self._teacher_of.items()}
            heads = {name: load_head(self.scores.path / file) for file, name in sorted(files.items())}
        if len({head.vocab for head in heads.values()}) > 1:
            raise ArtifactError(
                f"The heads of {self.scores.path} compare different numbers of ids.",
                "Run `tsdkd score` again with --overwrite.",
            )
        return SignalDecoder(config["signal"], config["k"], config["top_k"], heads)

    def shared_vocab(self, student: ModelSpec) -> int:
        """The number of ids that the scores compare. Raises InputError if the student does not know all of them."""
        vocab = self.decoder.vocab
        if vocab is None:
            return student.vocab
        if vocab > student.vocab:
            raise InputError(
                f"The scores compare {vocab:,} ids; {student.name} knows {student.vocab:,}.",
                f"Score with --student {student.name}.",
            )
        return vocab

    def end_ids(self, tokenizer: PreTrainedTokenizerBase) -> set[int]:
        """Also the teacher's end tokens, whose probabilities the scores hold."""
        return super().end_ids(tokenizer).union(self.scores.manifest.config.get(TEACHER_END_IDS, ()))

    def __getitem__(self, index: int) -> Sample:
        part, _ = self._rows[index]
        return super().__getitem__(index) | {"row": index, "teacher": self._teacher_of[part.file]}

    def _scores_row(self, index: int) -> dict[str, Any]:
        part, row_group = self._rows[index]
        file = self.scores.path / part.file
        with translate_arrow_errors(file):
            row = self._open(part).read_row_group(row_group, columns=list(self.decoder.columns))
        if "hidden" in row.column_names:
            check_hidden(file, row["hidden"], len(row["student_entropy"][0]), self._limits[part.file])
        values = {name: _single_value(row[name]) for name in row.column_names}
        return values | {"teacher": self._teacher_of[part.file]}

    def recorded(self, samples: list[Sample]) -> dict[str, Tensor]:
        return self.decoder.tensors([self._scores_row(sample["row"]) for sample in samples])

    def signal(self, batch: Batch) -> TeacherSignal:
        return self._decoder_on(batch["input_ids"].device).decode(batch["recorded"])

    def scoring_snapshot(self, batch: Batch) -> ScoringSnapshot:
        recorded = batch["recorded"]
        return ScoringSnapshot(predicted_ids(batch), recorded["student_log_prob"], recorded["candidates"])

    def measure_staleness(self, student: LanguageModel) -> Staleness:
        """Compares a student with the one that was scored, on evenly spaced rows of about `MEASURED_TOKENS` tokens."""
        mean_length = sum(map(self.length, range(len(self)))) / len(self)
        count = max(1, min(MEASURED_ROWS, len(self), int(MEASURED_TOKENS / mean_length)))
        weights, compared = [], []
        for i in torch.linspace(0, len(self) - 1, count).long().tolist():
            batch = send_to_device(collate([self[i]], self), student.device)
            snapshot = self.scoring_snapshot(batch)
            with torch.no_grad():
                compared.append(snapshot.compare(predicting_hidden(student, batch), student.head))
            weights.append(min(COMPARED_TOKENS, len(snapshot.response_ids)))
        means = {name: float(np.average([float(c[name]) for c in compared], weights=weights)) for name in compared[0]}
        return Staleness(**means)


def response_authors(rollouts: Artifact) -> set[str]:
    """The authors of a rollouts artifact's responses."""
    return {author for part in rollouts.tables for author in rollouts.read_part(part, ["author"])["author"].to_pylist()}


def _single_value(column: pa.ChunkedArray) -> Any:
    """The value of a column of one row: a list as a numpy array, other values as Python objects."""
    value = column[0]
    return value.values.to_numpy() if isinstance(value, pa.ListScalar) else value.as_py()
