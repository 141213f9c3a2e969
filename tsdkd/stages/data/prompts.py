"""Prompts, read one at a time from a JSONL, JSON, CSV or Parquet file, or from a dataset.

Memory holds the rows of one read (a JSON file is read whole), and 16 bytes for each prompt that was read.
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
from tsdkd.artifacts.locks import hold_input
from tsdkd.artifacts.manifest import HUB_DATASET, Parent, relative_path
from tsdkd.errors import InputError
from tsdkd.stages.data.hub import read_hub_dataset

Messages = list[dict[str, str]]
PromptRow = dict[str, Any]
"""A row of a prompts file: its cells by column."""


@dataclass(frozen=True, slots=True)
class Prompt:
    prompt_id: str
    source: str
    messages: Messages


@dataclass(frozen=True, slots=True)
class Prompts:
    """Distinct prompts in their order. Every iteration reads the file or dataset again."""

    path: Path
    """A file with a suffix of `READERS`, a dataset's directory, or a dataset's hub id."""
    column: str | None = None
    """The column of messages or text; None: `messages`, else `prompt`."""
    limit: int | None = None
    """Number of prompts to read; None: all."""
    system: str | None = None
    """A system message for prompts that have none. Prompt ids do not depend on it."""
    config_name: str | None = None
    """A dataset's configuration."""
    split: str | None = None
    """A dataset's split; None: train."""

    def __iter__(self) -> Iterator[Prompt]:
        return self.read(Counter())

    def read(self, skipped: Counter[str]) -> Iterator[Prompt]:
        """Yields prompts; counts the rows that it skips as "empty" or "duplicate" in `skipped`.

        Columns `prompt_id` and `source` replace the defaults, a hash of the messages and the file's name.
        Raises InputError for a missing, empty or malformed file, an unknown column, a cell that is not a prompt, or
        an id of two prompts.
        """
        contents: set[bytes] = set()
        ids: set[bytes] = set()
        column, number, count = "", 0, 0
        for number, row in enumerate(self._rows(), 1):
            if count == self.limit:
                return
            column = column or _prompt_column(self.path, list(row), self.column)
            messages = _messages(self.path, number, column, row.get(column))
            content = json_digest(messages)
            if not messages or _short_digest(content) in contents:
                skipped["duplicate" if messages else "empty"] += 1
                continue
            contents.add(_short_digest(content))
            prompt_id = row.get("prompt_id")
            if prompt_id is not None:
                _require_unique_id(self.path, number, str(prompt_id), ids)
            count += 1
            source = str(row.get("source") or self.path.stem)
            yield Prompt(str(prompt_id or content[:16]), source, self._with_system(messages))
        if not number:
            raise InputError(f"{self.path} holds no prompts.", "Add rows, or name another file.")

    def parent(self, output: Path) -> Parent:
        """The parent that an artifact at `output` records: a file by its bytes, a dataset by its prompts."""
        hold_input(self.path)
        if self._is_file:
            return Parent("prompts", file_digest(self.path), relative_path(self.path, output))
        content = json_digest([[prompt.prompt_id, json_digest(prompt.messages)] for prompt in self])
        return Parent(HUB_DATASET, content, str(self.path))

    @property
    def on_hub(self) -> bool:
        return not self._is_file and not self.path.exists()

    @property
    def _is_file(self) -> bool:
        return self.path.suffix.lower() in READERS

    def _rows(self) -> Iterator[PromptRow]:
        if not self._is_file:
            return read_hub_dataset(self.path, self.config_name, self.split)
        if not self.path.is_file():
            raise InputError(f"The prompts file {self.path} does not exist.", "Check the path.")
        if self.config_name or self.split:
            raise InputError(
                f"{self.path} is a file: it has no configurations and splits.", "Leave out --config-name and --split."
            )
        return READERS[self.path.suffix.lower()](self.path)

    def _with_system(self, messages: Messages) -> Messages:
        if self.system is None or messages[0]["role"] == "system":
            return messages
        return [{"role": "system", "content": self.system}, *messages]


def _short_digest(digest: str) -> bytes:
    """The first 16 bytes of a hexadecimal digest."""
    return bytes.fromhex(digest[:32])


def _require_unique_id(path: Path, number: int, prompt_id: str, ids: set[bytes]) -> None:
    """Adds an id to `ids`. Raises InputError if `ids` holds it already."""
    digest = _short_digest(json_digest(prompt_id))
    if digest in ids:
        raise InputError(f"{path}, row {number}: two prompts have the prompt_id {prompt_id!r}.", "Make ids unique.")
    ids.add(digest)


def _prompt_column(path: Path, columns: list[str], option: str | None) -> str:
    for name in (option,) if option else ("messages", "prompt"):
        if name in columns:
            return name
    missing = f"column {option!r}" if option else "column 'messages' or 'prompt'"
    raise InputError(f"{path} has no {missing}.", f"Choose with --column one of: {', '.join(columns)}.")


def _messages(path: Path, number: int, column: str, cell: Any) -> Messages:
    """The messages of a cell, without assistant messages at the end; an empty list for an empty prompt."""
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
        f"{path}, row {number}: {column!r} is neither text nor a list of messages with role and content.",
        "Correct the row, or choose another --column.",
    )


def _read_jsonl(path: Path) -> Iterator[PromptRow]:
    with _open_text(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"{path}, line {number}: not JSON ({error.msg}).", "Correct the line.") from None
            if not isinstance(row, dict):
                raise InputError(f"{path}, line {number}: not a JSON object.", "Write one object with named fields.")
            yield row


def _read_json(path: Path) -> Iterator[PromptRow]:
    with _open_text(path) as file:
        try:
            rows = json.load(file)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {error.lineno}: not JSON ({error.msg}).", "Correct the file.") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path} is not a list of JSON objects.", "Write [{...}, {...}], or use .jsonl.")
    yield from rows


def _read_csv(path: Path) -> Iterator[PromptRow]:
    with _open_text(path, newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for row in reader:
                if None in row or None in row.values():
                    cells = len(reader.fieldnames or [])
                    raise InputError(
                        f"{path}, line {reader.line_num}: the line does not have the {cells} cells of the header.",
                        "Correct the line; quote cells that hold commas.",
                    )
                yield row
        except csv.Error as error:
            raise InputError(
                f"{path}, line {reader.line_num}: not readable as CSV ({error}).", "Correct the file, or use .jsonl."
            ) from None


@contextmanager
def _open_text(path: Path, newline: str | None = None) -> Iterator[TextIO]:
    """Opens UTF-8 text, with or without a byte-order mark. Raises InputError for other encodings."""
    try:
        with path.open(encoding="utf-8-sig", newline=newline) as file:
            yield file
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 (byte {error.start}).", "Save the file as UTF-8.") from None


def _read_parquet(path: Path) -> Iterator[PromptRow]:
    try:
        for batch in pq.ParquetFile(path).iter_batches(batch_size=256):
            yield from batch.to_pylist()
    except pa.ArrowException as error:
        raise InputError(f"{path} is not a readable Parquet file ({error}).", "Check the file.") from None


READERS: dict[str, Callable[[Path], Iterator[PromptRow]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
"""By suffix."""
