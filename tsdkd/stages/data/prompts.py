"""Prompts, one after the other: from a JSONL, JSON, CSV or Parquet file, or from a dataset of the hub.

Only a JSON file is read whole; of everything else a few rows are in memory, and 16 bytes of each prompt seen.
"""

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from tsdkd.artifacts.hashing import file_digest, json_digest
from tsdkd.artifacts.manifest import HUB_DATASET, Parent, relative_path
from tsdkd.errors import InputError
from tsdkd.stages.data.hub import read_hub_dataset

Messages = list[dict[str, str]]
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Prompt:
    prompt_id: str
    source: str
    messages: Messages


@dataclass(frozen=True, slots=True)
class Prompts:
    """Distinct prompts in their order; iterating reads the file or dataset again."""

    place: Path
    """A file by its ending; else a directory that holds a dataset, or a dataset's id on the hub."""
    column: str | None = None
    """Column with messages or text; None: messages, else prompt."""
    limit: int | None = None
    system: str | None = None
    """Set before prompts that bring no system message; ids do not depend on it."""
    config_name: str | None = None
    """A dataset's configuration."""
    split: str | None = None
    """A dataset's split; None: train."""

    def __iter__(self) -> Iterator[Prompt]:
        return self.read(Counter())

    def read(self, left_out: Counter[str]) -> Iterator[Prompt]:
        """The prompts; counts in `left_out` what was "empty" or "repeated" up to the last one given.

        `prompt_id` and `source` columns ride along where they exist. Raises InputError for a missing, empty or
        malformed source, an unknown column, or a cell that is no prompt.
        """
        seen: set[bytes] = set()
        taken: set[bytes] = set()
        chosen, number, given = "", 0, 0
        for number, row in enumerate(self._rows(), 1):
            if given == self.limit:
                return
            chosen = chosen or _column(self.place, list(row), self.column)
            messages = _messages(self.place, number, chosen, row.get(chosen))
            content = json_digest(messages)
            if not messages or _key(content) in seen:
                left_out["repeated" if messages else "empty"] += 1
                continue
            seen.add(_key(content))
            prompt_id = row.get("prompt_id")
            if prompt_id is not None:
                _require_free(self.place, number, str(prompt_id), taken)
            given += 1
            source = str(row.get("source") or self.place.stem)
            yield Prompt(str(prompt_id or content[:16]), source, self._with_system(messages))
        if not number:
            raise InputError(f"{self.place} holds no prompts.", "Add rows, or name another file.")

    def parent(self, output: Path) -> Parent:
        """How an artifact at `output` records these prompts: a file by its bytes, a dataset by its prompts."""
        if self._is_file:
            return Parent("prompts", file_digest(self.place), relative_path(self.place, output))
        content = json_digest([[prompt.prompt_id, json_digest(prompt.messages)] for prompt in self])
        return Parent(HUB_DATASET, content, str(self.place))

    @property
    def on_hub(self) -> bool:
        return not self._is_file and not self.place.exists()

    @property
    def _is_file(self) -> bool:
        return self.place.suffix.lower() in READERS

    def _rows(self) -> Iterator[Row]:
        if not self._is_file:
            return read_hub_dataset(self.place, self.config_name, self.split)
        if not self.place.is_file():
            raise InputError(f"There is no prompts file {self.place}.", "Check the path.")
        if self.config_name or self.split:
            raise InputError(
                f"{self.place} is a file: it has no configurations and splits.", "Leave out --config-name and --split."
            )
        return READERS[self.place.suffix.lower()](self.place)

    def _with_system(self, messages: Messages) -> Messages:
        if self.system is None or messages[0]["role"] == "system":
            return messages
        return [{"role": "system", "content": self.system}, *messages]


def _key(content: str) -> bytes:
    return bytes.fromhex(content[:32])


def _require_free(place: Path, number: int, prompt_id: str, taken: set[bytes]) -> None:
    key = _key(json_digest(prompt_id))
    if key in taken:
        raise InputError(f"{place}, row {number}: prompt_id {prompt_id!r} stands for two prompts.", "Make ids unique.")
    taken.add(key)


def _column(place: Path, columns: list[str], wanted: str | None) -> str:
    for name in (wanted,) if wanted else ("messages", "prompt"):
        if name in columns:
            return name
    missing = f"column {wanted!r}" if wanted else "column 'messages' or 'prompt'"
    raise InputError(f"{place} has no {missing}.", f"Choose with --column one of: {', '.join(columns)}.")


def _messages(place: Path, number: int, column: str, cell: Any) -> Messages:
    """A cell as a conversation, less answers at its end; empty where nothing is asked."""
    if cell is None or (isinstance(cell, str) and not cell.strip()):
        return []
    if isinstance(cell, str):
        return [{"role": "user", "content": cell}]
    if isinstance(cell, list) and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in cell):
        messages = [{"role": str(m["role"]), "content": str(m["content"])} for m in cell]
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        return messages if any(message["content"].strip() for message in messages) else []
    raise InputError(
        f"{place}, row {number}: {column!r} is neither text nor a list of messages with role and content.",
        "Mend the row, or choose another --column.",
    )


def _read_jsonl(path: Path) -> Iterator[Row]:
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
            yield row


def _read_json(path: Path) -> Iterator[Row]:
    with _text(path) as file:
        try:
            rows = json.load(file)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {error.lineno}: not JSON ({error.msg}).", "Mend the file.") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path} is no list of JSON objects.", "Write [{...}, {...}], or use .jsonl.")
    yield from rows


def _read_csv(path: Path) -> Iterator[Row]:
    with _text(path, newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise InputError(
                        f"{path}, line {reader.line_num}: not the {len(reader.fieldnames or [])} cells of the header.",
                        "Mend the line; quote cells that hold commas.",
                    )
                yield row
        except csv.Error as error:
            raise InputError(
                f"{path}, line {reader.line_num}: no readable CSV ({error}).", "Mend the file, or use .jsonl."
            ) from None


@contextmanager
def _text(path: Path, newline: str | None = None) -> Iterator[TextIO]:
    """UTF-8, with or without a byte-order mark."""
    try:
        with path.open(encoding="utf-8-sig", newline=newline) as file:
            yield file
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 (byte {error.start}).", "Save the file as UTF-8.") from None


def _read_parquet(path: Path) -> Iterator[Row]:
    try:
        for batch in pq.ParquetFile(path).iter_batches(batch_size=256):
            yield from batch.to_pylist()
    except pa.ArrowException as error:
        raise InputError(f"{path} is no readable Parquet file ({error}).", "Check the file.") from None


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
