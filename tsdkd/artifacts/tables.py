"""Checks the tables of artifacts, which are untrusted: columns, nulls, lengths, ids and numbers."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tsdkd.artifacts.files import HEAD_FILE, teacher_file, teacher_index
from tsdkd.artifacts.json_files import conform, parse_json
from tsdkd.artifacts.manifest import Manifest
from tsdkd.artifacts.schemas import NOT_EMPTY, PER_TOKEN, SIGNAL_COLUMNS, UNRECORDED, schema_of
from tsdkd.errors import ArtifactError, first_line

MAX_HEADER = 1 << 20
"""Bytes of the longest safetensors header."""
INFINITY = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}
"""The bits of infinity in each precision of safetensors; those of greater numbers are NaN."""
ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "I8": 1}


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of the values in a table of an artifact; None where no bound is known."""

    kind: str
    signal: str = ""
    """The teacher signal of scores."""
    widths: dict[str, int] | None = None
    """Entries per token of the columns of scores that have several."""
    vocab: int | None = None
    """Token ids and ranks are below it."""
    hidden: tuple[str, int] | None = None
    """Precision and width of the teacher's hidden states."""
    teacher: str = ""
    """The name of the teacher that read the table's rows; "" for an only one."""


def limits_of(path: Path, manifest: Manifest, file: str) -> Limits:
    """The limits of the table `file`. Raises ArtifactError for a damaged head, and for scores of no teacher."""
    if manifest.kind != "scores":
        return Limits(manifest.kind)
    config = manifest.config
    widths = {"candidates": config["k"], "ranks": config["k"]}
    widths |= dict.fromkeys(("top_ids", "top_log_probs"), config["top_k"])
    teacher, head = teacher_of(path, manifest, file), teacher_file(HEAD_FILE, teacher_index(file))
    if not any(part.file == head for part in manifest.parts):
        return Limits("scores", config["signal"], widths, teacher=teacher)
    precision, (vocab, width) = _head_shape(path / head)
    hidden = ("I8" if config["signal"] == "hidden8" else precision, width)
    return Limits("scores", config["signal"], widths, vocab, hidden, teacher)


def teacher_of(path: Path, manifest: Manifest, file: str) -> str:
    """The name of the teacher whose scores a table holds, which its file name decides; "" for an only teacher.

    Raises ArtifactError for a table of no recorded teacher.
    """
    names, index = list(manifest.teachers) or [""], teacher_index(file)
    if (index is None) == (len(names) == 1) and (index or 0) < len(names):
        return names[index or 0]
    raise _damaged(path / file, "the scores of a teacher that the manifest does not record")


@contextmanager
def open_table(file: Path, kind: str, rows: int | None) -> Iterator[pq.ParquetFile]:
    """A Parquet part. Raises ArtifactError for other columns, another number of rows, and what Arrow cannot read."""
    with translate_arrow_errors(file), pq.ParquetFile(file) as table:
        if table.schema_arrow != schema_of(kind, table.schema_arrow.names) or table.metadata.num_rows != rows:
            raise _damaged(file, "columns or rows that differ from the manifest")
        yield table


@contextmanager
def translate_arrow_errors(file: Path) -> Iterator[None]:
    """Raise ArtifactError for what Arrow cannot read."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise ArtifactError(
            f"{file} cannot be read ({first_line(error)}).",
            f"Run `tsdkd artifact verify {file.parent}` to find the damaged files.",
        ) from None


def check_values(file: Path, table: pa.Table, limits: Limits) -> None:
    """Raises ArtifactError for a column of a part with wrong values."""
    for name in table.column_names:
        if problem := _column_problem(name, table[name], limits):
            raise _damaged(file, f"{problem} in the column {name}")
    if {"response_ids", "response_mask"} <= set(table.column_names) and not _masks_fit(table):
        raise _damaged(file, "entries in the column response_mask that do not fit the response")
    if limits.kind == "scores" and {*_values(table, "teacher")} - {limits.teacher}:
        raise _damaged(file, "the name of another teacher in the column teacher")
    if limits.kind == "scores" and (name := _wrong_length(table, limits)):
        raise _damaged(file, f"entries in the column {name} that do not fit the number of tokens")


def check_hidden(file: Path, column: pa.ChunkedArray, tokens: int, limits: Limits) -> None:
    """Raises ArtifactError unless the hidden states of one row are finite and as many as its tokens.

    It costs less than `check_values`, for rows whose other columns are checked.
    """
    precision, width = limits.hidden or ("", 0)
    size = tokens * width * ITEM_BYTES.get(precision, 0)
    if not column[0].is_valid or len(column[0].as_buffer()) != size:
        raise _damaged(file, "entries in the column hidden that do not fit the number of tokens")
    if not _all_finite(column, precision):
        raise _damaged(file, "a value that is not finite in the column hidden")


def _column_problem(name: str, column: pa.ChunkedArray, limits: Limits) -> str:
    """What is wrong with the values of one column; "" if nothing is."""
    if column.null_count:
        recorded = limits.kind != "scores" or name not in UNRECORDED or name in SIGNAL_COLUMNS[limits.signal]
        return "a missing value" if recorded or column.null_count < len(column) else ""
    if name == "hidden":
        return "" if limits.hidden is None or _all_finite(column, limits.hidden[0]) else "a value that is not finite"
    if pa.types.is_list(column.type):
        if name in NOT_EMPTY and not pc.min(pc.list_value_length(column)).as_py():
            return "an empty list"
        column = pc.list_flatten(column)
    return _value_problem(name, column, limits)


def _value_problem(name: str, values: pa.ChunkedArray, limits: Limits) -> str:
    """What is wrong with values outside lists."""
    if values.null_count:
        return "a missing value"
    if pa.types.is_struct(values.type):
        fields = [pc.struct_field(values, [i]) for i in range(values.type.num_fields)]
        problems = (_value_problem(name, field, limits) for field in fields)
        return next((problem for problem in problems if problem), "")
    if pa.types.is_string(values.type):
        values.validate(full=True)  # raises ArrowInvalid for text that is not UTF-8
        return ""
    return _number_problem(name, values, limits.vocab) if len(values) and not pa.types.is_boolean(values.type) else ""


def _number_problem(name: str, values: pa.ChunkedArray, vocab: int | None) -> str:
    if pa.types.is_floating(values.type):
        if not pc.all(pc.is_finite(values)).as_py():
            return "a value that is not finite"
        return "a weight that is not above 0" if name == "weight" and pc.min(values).as_py() <= 0 else ""
    least, most = (bound.as_py() for bound in pc.min_max(values).values())
    if least < 0:
        return f"the negative number {least}"
    return "" if vocab is None or most < vocab else f"the id {most}, above the teacher's {vocab:,} tokens,"


def _wrong_length(table: pa.Table, limits: Limits) -> str:
    """The first column of scores whose number of entries does not fit the tokens; "" if all fit."""
    lengths: dict[str, np.ndarray] = {
        name: _lengths(table[name])
        for name in table.column_names
        if not pa.types.is_string(table[name].type) and not table[name].null_count
    }
    tokens = next((lengths[name] for name in lengths if name in PER_TOKEN), None)
    widths = dict.fromkeys(PER_TOKEN, 1) | (limits.widths or {})
    if limits.hidden is not None:
        widths["hidden"] = ITEM_BYTES[limits.hidden[0]] * limits.hidden[1]
    for name in sorted(lengths.keys() & widths.keys()):
        width, counts = widths[name], lengths[name]
        if not np.array_equal(counts, counts // width * width if tokens is None else tokens * width):
            return name
    return ""


def _values(table: pa.Table, name: str) -> list[Any]:
    """The values of a column; empty where the table has none of this name."""
    return list(table[name].to_pylist()) if name in table.column_names else []


def _masks_fit(rollouts: pa.Table) -> bool:
    """Whether every mask has an entry for each token of its response, and marks one at least."""
    masks = rollouts["response_mask"]
    return np.array_equal(_lengths(masks), _lengths(rollouts["response_ids"])) and all(map(any, masks.to_pylist()))


def _lengths(column: pa.ChunkedArray) -> np.ndarray:
    length = pc.list_value_length if pa.types.is_list(column.type) else pc.binary_length
    counts: np.ndarray = length(column).combine_chunks().to_numpy()
    return counts.astype(np.int64)


def _all_finite(column: pa.ChunkedArray, precision: str) -> bool:
    """Whether no value of a binary column is NaN or infinite, by comparing bits in two passes at memory speed."""
    if precision not in INFINITY:
        return True
    size, infinity = ITEM_BYTES[precision], INFINITY[precision]
    for chunk in column.chunks:
        _, offsets, content = chunk.buffers()
        ends = np.frombuffer(offsets, np.int64)[chunk.offset : chunk.offset + len(chunk) + 1]
        values = np.frombuffer(content, np.uint8)[ends[0] : ends[-1]]
        values = values[: len(values) // size * size]
        if not len(values):
            continue
        negative_infinity = infinity + (1 << (8 * size - 1))
        if values.view(f"i{size}").max() >= infinity or values.view(f"u{size}").max() >= negative_infinity:
            return False
    return True


def _head_shape(file: Path) -> tuple[str, tuple[int, int]]:
    """Precision, rows and width of the teacher's head, from the header of its safetensors file."""
    try:
        with file.open("rb") as content:
            header = parse_json(
                content.read(min(MAX_HEADER, int.from_bytes(content.read(8), "little"))), dict[str, Any]
            )
        precision = str(header["weight"]["dtype"])
        rows, width = conform(header["weight"]["shape"], list[int], "shape")
        ITEM_BYTES[precision]
    except (OSError, ValueError, TypeError, KeyError, ArtifactError):
        raise _damaged(file, "no head") from None
    return precision, (rows, width)


def _damaged(file: Path, problem: str) -> ArtifactError:
    return ArtifactError(f"{file} has {problem}.", f"Make {file.parent} again with --overwrite.")
