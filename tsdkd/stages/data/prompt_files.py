"""The rows of prompts files (JSONL, JSON, CSV, Parquet), each with its location.

Rows are streamed; only a JSON file is read into memory as a whole.
"""

import csv
import json
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tsdkd.artifacts.regular_files import require_regular_file
from tsdkd.errors import InputError, first_line

PromptRow = dict[str, Any]
"""The cells of a row by column. Cells of columns that were not requested may be None."""
MAX_LINE, MAX_JSON = 1 << 26, 1 << 31
"""Characters of the longest line, and bytes of the longest JSON file, whose one line may hold the whole list."""
LocatedRow = tuple[str, PromptRow]
"""A location, such as "prompts.jsonl, line 3", and the row there."""


def without_padding(value: Any) -> Any:
    """A nested value without the nulls that tables pad objects with; bytes become text where they are UTF-8.

    A null content of a message is kept.
    """
    if isinstance(value, dict):
        kept = {"content"} if "role" in value else set()
        return {k: without_padding(item) for k, item in value.items() if item is not None or k in kept}
    if isinstance(value, list):
        return [without_padding(item) for item in value]
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value
    return value


def _read_jsonl(path: Path, columns: Collection[str]) -> Iterator[LocatedRow]:
    first, repeated = True, dict[str, object]()
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        if first and line.lstrip().startswith("["):
            raise InputError(f"{path} holds a JSON list, not one object per line.", "Rename it to .json.")
        first = False
        location = f"{path}, line {number}"
        try:
            row = json.loads(line, object_pairs_hook=partial(_object, repeated))
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{location}: not JSON ({_reason(error)}).", "Correct the line; each line is one JSON object."
            ) from None
        yield location, _checked_object(location, row, repeated)


def _read_json(path: Path, columns: Collection[str]) -> Iterator[LocatedRow]:
    require_regular_file(path, "prompts file", MAX_JSON)
    text, repeated = "".join(_lines(path, MAX_JSON)), dict[str, object]()
    try:
        rows = json.loads(text, object_pairs_hook=partial(_object, repeated))
    except (ValueError, RecursionError) as error:
        if getattr(error, "msg", "") == "Extra data" and text.lstrip().startswith("{"):
            raise InputError(f"{path} holds one JSON object per line, not a list.", "Rename it to .jsonl.") from None
        location = f"{path}, line {error.lineno}" if isinstance(error, json.JSONDecodeError) else str(path)
        raise InputError(f"{location}: not JSON ({_reason(error)}).", "Correct the file.") from None
    if not isinstance(rows, list):
        raise InputError(f"{path} is not a list of JSON objects.", "Write [{...}, {...}], or use .jsonl.")
    for number, row in enumerate(rows, 1):
        location = f"{path}, row {number}"
        yield location, _checked_object(location, row, repeated)


def _read_csv(path: Path, columns: Collection[str]) -> Iterator[LocatedRow]:
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(_lines(path), strict=True)
    names: list[str] = []
    while True:
        location = f"{path}, line {reader.line_num + 1}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise InputError(
                f"{location}: not readable as CSV ({error}).", "Correct the quotes, or use .jsonl."
            ) from None
        if cells is None:
            return
        if not names:
            names = cells
            _require_distinct(path, names, columns)
        elif cells and len(cells) != len(names):
            raise InputError(
                f"{location}: the line does not have the {len(names)} cells of the header.",
                "Correct the line; quote cells that hold commas.",
            )
        elif cells:
            yield location, dict(zip(names, cells, strict=True))


def _read_parquet(path: Path, columns: Collection[str]) -> Iterator[LocatedRow]:
    number = 0
    try:
        file = pq.ParquetFile(path)
        names = file.schema_arrow.names
        _require_distinct(path, names, columns)
        chosen = [name for name in names if name in columns] or names[:1]
        for batch in file.iter_batches(batch_size=256, columns=chosen):
            for row in batch.to_pylist(maps_as_pydicts="strict"):
                number += 1
                yield f"{path}, row {number}", dict.fromkeys(names) | {k: without_padding(v) for k, v in row.items()}
    except InputError:
        raise
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        after = f" after row {number}" if number else ""
        raise InputError(
            f"{path} is not a readable Parquet file{after} ({first_line(error)}).", "Check the file."
        ) from None


def _lines(path: Path, longest: int = MAX_LINE) -> Iterator[str]:
    """Lines of UTF-8 text with their ends, without a byte-order mark. Raises InputError."""
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            for number, line in enumerate(iter(partial(file.readline, longest), ""), 1):
                if len(line) == longest:
                    raise InputError(f"{path}, line {number}: longer than {longest:,} characters.", "Shorten the line.")
                try:
                    line.encode()
                except UnicodeEncodeError:
                    raise InputError(f"{path}, line {number}: not UTF-8.", "Save the file as UTF-8.") from None
                yield line
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}).", "Check the file and its permissions.") from None


def _object(repeated: dict[str, object], pairs: Sequence[tuple[str, Any]]) -> Any:
    """A JSON object; an object with a repeated key becomes a marker, which `repeated` holds under the key."""
    row = dict(pairs)
    if len(row) == len(pairs):
        return row
    names = [name for name, _ in pairs]
    return repeated.setdefault(next(name for name in names if names.count(name) > 1), object())


def _checked_object(location: str, row: Any, repeated: dict[str, object]) -> PromptRow:
    """Raises InputError for a row that is not an object, and for one that contains a marker of `repeated`."""

    def refuse(value: object) -> None:
        key = next(name for name, marker in repeated.items() if marker is value)
        raise InputError(f"{location}: the key {key!r} occurs twice in an object.", "Remove one of them.")

    if repeated:
        json.dumps(row, default=refuse)
    if not isinstance(row, dict):
        raise InputError(f"{location}: not a JSON object.", "Write one object with named fields.")
    return row


def _require_distinct(path: Path, names: Sequence[str], columns: Collection[str]) -> None:
    """Raises InputError if the file has one of these columns twice."""
    for name in columns:
        if names.count(name) > 1:
            raise InputError(f"{path} has the column {name!r} twice.", "Rename one of them.")


def _reason(error: Exception) -> str:
    return str(getattr(error, "msg", "")) or first_line(error)


READERS: dict[str, Callable[[Path, Collection[str]], Iterator[LocatedRow]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
"""Readers by suffix. The columns are those that the caller needs."""
