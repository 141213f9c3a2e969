"""Tables are untrusted: every reader and `verify` refuse wrong values."""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tsdkd.artifacts.files import HEAD_FILE
from tsdkd.artifacts.hashing import file_digest
from tsdkd.artifacts.manifest import Manifest, load_manifest, save_manifest
from tsdkd.artifacts.reader import Artifact, read_artifact, verify_artifact
from tsdkd.artifacts.schemas import SCHEMAS, schema_of
from tsdkd.artifacts.tables import Limits, check_hidden, check_values
from tsdkd.artifacts.writer import Writer
from tsdkd.core import Head
from tsdkd.errors import ArtifactError
from tsdkd.stages.config.score import ScoreConfig
from tsdkd.stages.data.signal_storage import save_head, score_table

TOKENS, K, VOCAB, WIDTH = 3, 2, 50, 4
FILE = "part-00000.parquet"
Row = dict[str, Any]


@pytest.fixture
def scores(tmp_path: Path) -> Artifact:
    """Scores of two responses, with the hidden states of a tiny teacher in bfloat16."""
    light = dict.fromkeys(("student_entropy", "teacher_entropy"), torch.ones(TOKENS))
    light |= dict.fromkeys(("student_log_prob", "teacher_log_prob"), -torch.ones(TOKENS))
    light |= dict.fromkeys(("candidates", "ranks"), torch.ones(TOKENS, K, dtype=torch.long))
    unrecorded = dict.fromkeys(("hidden_scale", "top_ids", "top_log_probs", "divergence", "signal_divergence"))
    row = {**light, **unrecorded, "hidden": torch.ones(TOKENS, WIDTH).bfloat16()}
    with Writer.open(tmp_path / "scores", Manifest("scores", asdict(ScoreConfig(k=K)), 0)) as writer:
        save_head(Head(torch.ones(VOCAB, WIDTH).bfloat16()), writer.temporary_path(HEAD_FILE))
        writer.add_file(HEAD_FILE)
        writer.write_table(FILE, pa.concat_tables([score_table({"sample_id": name, **row}) for name in "ab"]))
        return writer.finish({})


def rewrite(artifact: Artifact, table: pa.Table) -> None:
    """Replace the table of an artifact, with the size and hash of its manifest."""
    file = artifact.path / FILE
    pq.write_table(table, file)
    parts = [
        replace(part, bytes=file.stat().st_size, sha256=file_digest(file)) if part.file == FILE else part
        for part in artifact.manifest.parts
    ]
    save_manifest(artifact.path, replace(artifact.manifest, parts=tuple(parts)))


def hidden(value: float) -> Callable[[Row], None]:
    values = torch.ones(TOKENS, WIDTH)
    values[1, 2] = value
    return lambda row: row.update(hidden=values.bfloat16().view(torch.uint8).numpy().tobytes())


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda row: row.update(sample_id=None), "a missing value in the column sample_id"),
        (lambda row: row.update(hidden=None), "a missing value in the column hidden"),
        (lambda row: row.update(hidden=b"1234567"), "entries in the column hidden"),
        (hidden(float("nan")), "not finite in the column hidden"),
        (hidden(float("inf")), "not finite in the column hidden"),
        (hidden(float("-inf")), "not finite in the column hidden"),
        (lambda row: row.update(top_ids=[1] * 6), "a missing value in the column top_ids"),
        (lambda row: row.update(student_entropy=[]), "an empty list in the column student_entropy"),
        (lambda row: row.update(student_entropy=[1.0, None, 1.0]), "a missing value in the column student_entropy"),
        (lambda row: row["teacher_entropy"].append(1.0), "entries in the column teacher_entropy"),
        (lambda row: row["candidates"].pop(), "entries in the column candidates"),
        (lambda row: row["candidates"].__setitem__(0, -1), "the negative number -1 in the column candidates"),
        (lambda row: row["candidates"].__setitem__(0, VOCAB), "the id 50, above the teacher.s 50 tokens"),
        (lambda row: row["ranks"].__setitem__(0, -2), "the negative number -2 in the column ranks"),
        (lambda row: row["student_log_prob"].__setitem__(0, float("nan")), "not finite in the column student_log_prob"),
    ],
)
def test_wrong_values_in_scores_are_refused(scores: Artifact, change: Callable[[Row], object], problem: str) -> None:
    verify_artifact(scores.path)
    rows = scores.table().to_pylist()
    change(rows[1])
    rewrite(scores, pa.Table.from_pylist(rows, scores.table().schema))
    with pytest.raises(ArtifactError, match=problem):
        verify_artifact(scores.path)
    with pytest.raises(ArtifactError, match=problem):
        read_artifact(scores.path, "scores").table()


def column_of(*values: bytes | None) -> pa.ChunkedArray:
    return pa.chunked_array([pa.array(values, SCHEMAS["scores"].field("hidden").type)])


@pytest.mark.parametrize(
    ("precision", "dtype"), [("BF16", torch.bfloat16), ("F16", torch.float16), ("F32", torch.float32)]
)
def test_hidden_states_of_one_row_are_finite_in_their_precision(precision: str, dtype: torch.dtype) -> None:
    """The largest numbers pass, and so does a row beside one that is not finite."""
    limits = Limits("scores", "hidden", {}, VOCAB, (precision, WIDTH))
    largest = torch.finfo(dtype).max
    for value in (float("nan"), float("inf"), float("-inf")):
        rows = torch.full((2, TOKENS, WIDTH), largest, dtype=dtype)
        rows[0, 1] = -largest
        rows[1, 1, 2] = value
        column = column_of(*(row.view(torch.uint8).numpy().tobytes() for row in rows))
        check_hidden(Path("part"), column.slice(0, 1), TOKENS, limits)
        with pytest.raises(ArtifactError, match="not finite in the column hidden"):
            check_hidden(Path("part"), column.slice(1), TOKENS, limits)


@pytest.mark.parametrize("content", [None, b"", bytes(2 * TOKENS * WIDTH - 1), bytes(2 * TOKENS * WIDTH + 2)])
def test_hidden_states_of_one_row_are_as_many_as_its_tokens(content: bytes | None) -> None:
    limits = Limits("scores", "hidden", {}, VOCAB, ("BF16", WIDTH))
    check_hidden(Path("part"), column_of(bytes(2 * TOKENS * WIDTH)), TOKENS, limits)
    with pytest.raises(ArtifactError, match="do not fit the number of tokens"):
        check_hidden(Path("part"), column_of(content), TOKENS, limits)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), None])
def test_weights_are_above_0(weight: float | None) -> None:
    with pytest.raises(ArtifactError, match=r"above 0|not finite|missing value"):
        check_values(Path("part"), pa.table({"weight": [1.0, weight]}), Limits("rollouts"))
    check_values(Path("part"), pa.table({"weight": [1.0, 0.5]}), Limits("rollouts"))


@pytest.mark.parametrize(
    "change",
    [
        lambda table: table.drop_columns("ranks"),
        lambda table: table.rename_columns(["id", *table.column_names[1:]]),
        lambda table: table.set_column(0, "sample_id", pa.array([1, 2])),
        lambda table: table.slice(1),
    ],
)
def test_other_columns_and_rows_are_refused_by_a_reader(
    scores: Artifact, change: Callable[[pa.Table], pa.Table]
) -> None:
    rewrite(scores, change(scores.table()))
    with pytest.raises(ArtifactError, match="columns or rows that differ"):
        read_artifact(scores.path, "scores").table(["student_entropy"])


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + b"\xff" * 100 + b"PAR1"])
def test_a_table_that_arrow_cannot_read_is_one_error(scores: Artifact, content: bytes) -> None:
    (scores.path / FILE).write_bytes(content)
    with pytest.raises(ArtifactError, match="cannot be read"):
        Artifact(scores.path, load_manifest(scores.path)).table()


def test_text_that_is_not_utf8_is_refused(scores: Artifact) -> None:
    table = scores.table()
    ids = pa.Array.from_buffers(pa.string(), 2, [None, *pa.array([b"\xff", b"b"]).buffers()[1:]])
    rewrite(scores, table.set_column(0, "sample_id", ids))
    with pytest.raises(ArtifactError, match="cannot be read"):
        verify_artifact(scores.path)


def test_a_damaged_head_is_refused(scores: Artifact) -> None:
    (scores.path / HEAD_FILE).write_bytes(b"\xff" * 64)
    with pytest.raises(ArtifactError, match="has no head"):
        scores.table()


def test_a_part_that_links_to_a_file_outside_is_refused(scores: Artifact, tmp_path: Path) -> None:
    (scores.path / FILE).rename(tmp_path / "elsewhere.parquet")
    (scores.path / FILE).symlink_to(tmp_path / "elsewhere.parquet")
    for read in (lambda: read_artifact(scores.path, "scores"), scores.table):
        with pytest.raises(ArtifactError, match="links to a file outside its artifact"):
            read()


ROLLOUT = {
    **dict.fromkeys(("sample_id", "prompt_id", "source", "response", "author"), "a"),
    "messages": [{"role": "user", "content": "a"}],
    "prompt_ids": [1],
    "response_ids": [2, 3, 4],
    "finish_reason": "stop",
    "teacher_tokens": 0,
}


def rollouts(path: Path, *masks: list[bool] | None) -> Artifact:
    """Rollouts with these masks; without the column if there is none."""
    rows = [ROLLOUT | ({} if mask is None else {"response_mask": mask}) for mask in masks]
    with Writer.open(path, Manifest("rollouts", {}, 0)) as writer:
        writer.write_table(FILE, pa.Table.from_pylist(rows, schema_of("rollouts", rows[0])))
        return writer.finish({})


def test_an_optional_column_is_read_as_nulls_where_it_is_absent(tmp_path: Path) -> None:
    columns = ["response_ids", "response_mask"]
    plain, masked = rollouts(tmp_path / "plain", None), rollouts(tmp_path / "masked", [True, False, True])
    assert pq.read_schema(plain.path / FILE).names == SCHEMAS["rollouts"].names
    assert plain.table(columns)["response_mask"].to_pylist() == [None]
    assert masked.table(columns)["response_mask"].to_pylist() == [[True, False, True]]
    assert plain.table(columns).schema == masked.table(columns).schema
    for artifact in (plain, masked):
        verify_artifact(artifact.path)


@pytest.mark.parametrize("mask", [[True, False], [True] * 4, [], [False] * 3])
def test_a_mask_that_does_not_fit_its_response_is_refused(mask: list[bool], tmp_path: Path) -> None:
    artifact = rollouts(tmp_path / "rollouts", [True] * 3, mask)
    with pytest.raises(ArtifactError, match="response_mask that do not fit the response"):
        artifact.table(["response_ids", "response_mask"])
    with pytest.raises(ArtifactError, match="response_mask"):
        verify_artifact(artifact.path)
