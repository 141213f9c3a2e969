"""Prompts from a JSONL, JSON, CSV or Parquet file: a column of chat messages or of text."""

import csv
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from tsdkd.artifacts import digest
from tsdkd.errors import InputError

Messages = list[dict[str, str]]


@dataclass(frozen=True, slots=True)
class Prompt:
    prompt_id: str
    source: str
    messages: Messages


def read_prompts(path: Path, column: str | None = None, limit: int | None = None) -> list[Prompt]:
    """The file's distinct prompts in order; `prompt_id` and `source` columns ride along where they exist.

    Raises InputError for a missing, empty or malformed file, an unknown column, or a cell that is no prompt.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"{path} is no prompts file I can read.", f"Use one of {', '.join(READERS)}.")
    if not path.is_file():
        raise InputError(f"There is no prompts file {path}.", "Check the path.")
    rows = reader(path)
    if not rows:
        raise InputError(f"{path} holds no prompts.", "Add rows, or name another file.")
    chosen = _column(path, list(rows[0]), column)
    prompts: dict[str, Prompt] = {}
    for number, row in enumerate(rows, 1):
        messages = _messages(path, number, chosen, row.get(chosen))
        prompt_id = str(row.get("prompt_id") or digest(messages)[:16])
        if prompt_id in prompts and prompts[prompt_id].messages != messages:
            raise InputError(
                f"{path}, row {number}: prompt_id {prompt_id!r} stands for two prompts.", "Make ids unique."
            )
        prompts[prompt_id] = Prompt(prompt_id, str(row.get("source") or path.stem), messages)
    return list(prompts.values())[:limit]


def _column(path: Path, columns: list[str], wanted: str | None) -> str:
    for name in (wanted,) if wanted else ("messages", "prompt"):
        if name in columns:
            return name
    missing = f"column {wanted!r}" if wanted else "column 'messages' or 'prompt'"
    raise InputError(f"{path} has no {missing}.", f"Choose with --column one of: {', '.join(columns)}.")


def _messages(path: Path, number: int, column: str, cell: Any) -> Messages:
    if isinstance(cell, str) and cell.strip():
        return [{"role": "user", "content": cell}]
    if isinstance(cell, list) and cell and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in cell):
        return [{"role": str(m["role"]), "content": str(m["content"])} for m in cell]
    raise InputError(
        f"{path}, row {number}: {column!r} is neither text nor a list of messages with role and content.",
        "Mend the row, or choose another --column.",
    )


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    rows = []
    with _text(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"{path}, line {number}: not JSON ({error.msg}).", "Mend the line.") from None
            if not isinstance(row, dict):
                raise InputError(f"{path}, line {number}: not a JSON object.", "Write one object with named fields.")
            rows.append(row)
    return rows


def _read_json(path: Path) -> list[dict[str, Any]]:
    with _text(path) as file:
        try:
            rows = json.load(file)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {error.lineno}: not JSON ({error.msg}).", "Mend the file.") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path} is no list of JSON objects.", "Write [{...}, {...}], or use .jsonl.")
    return rows


def _read_csv(path: Path) -> list[dict[str, Any]]:
    with _text(path, newline="") as file:
        try:
            return list(csv.DictReader(file))
        except csv.Error as error:
            raise InputError(f"{path} is no readable CSV ({error}).", "Mend the file, or use .jsonl.") from None


@contextmanager
def _text(path: Path, newline: str | None = None) -> Iterator[TextIO]:
    """UTF-8, with or without a byte-order mark."""
    try:
        with path.open(encoding="utf-8-sig", newline=newline) as file:
            yield file
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 (byte {error.start}).", "Save the file as UTF-8.") from None


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    try:
        return list(pq.read_table(path).to_pylist())
    except pa.ArrowException as error:
        raise InputError(f"{path} is no readable Parquet file ({error}).", "Check the file.") from None


READERS: dict[str, Callable[[Path], list[dict[str, Any]]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
