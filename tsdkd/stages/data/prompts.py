"""Prompts, read one at a time from a JSONL, JSON, CSV or Parquet file, or from a dataset.

Memory holds 16 bytes for each prompt, besides the rows of the reader.
"""

import shlex
import stat
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tsdkd.artifacts.hashing import file_digest, json_digest
from tsdkd.artifacts.locks import register_input
from tsdkd.artifacts.manifest import HUB_DATASET, MAX_TEACHER_NAME, Parent, is_teacher_name, relative_path
from tsdkd.artifacts.regular_files import require_regular_file
from tsdkd.errors import InputError
from tsdkd.stages.data.hub import file_mode, read_hub_dataset
from tsdkd.stages.data.messages import (
    Messages,
    Tools,
    is_empty_prompt,
    is_missing,
    located,
    prompt_content,
    read_messages,
    read_tools,
    require_encodable,
)
from tsdkd.stages.data.prompt_files import READERS, LocatedRow, PromptRow, without_padding

PROMPT_COLUMNS = ("messages", "prompt")
"""The prompt is the first of these columns whose cell is not empty."""
OTHER_COLUMNS = ("tools", "prompt_id", "source")


@dataclass(frozen=True, slots=True)
class Prompt:
    prompt_id: str
    source: str
    messages: Messages
    tools: Tools | None = None
    location: str = field(default="", compare=False)
    """The file and line or row, such as "prompts.jsonl, line 3"."""
    teacher: str = ""
    """The name of its teacher; empty if prompts name none."""


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
    teacher_by: str | None = None
    """The column that names the teacher of each prompt; None: prompts name none."""
    teachers: Collection[str] = ()
    """The names of the teachers; empty: a prompt may name any."""

    def __iter__(self) -> Iterator[Prompt]:
        return self.read(Counter())

    def read(self, skipped: Counter[str]) -> Iterator[Prompt]:
        """Yields prompts; counts the rows that it skips as "empty" or "duplicate" in `skipped`.

        Columns `prompt_id` and `source` replace the defaults, a hash of messages and tools, and the file's name.
        Raises InputError for a missing, empty or malformed file, an unknown column, a cell that is not a prompt, an
        id of two prompts, or a prompt that names no teacher or an unknown one.
        """
        contents: set[bytes] = set()
        ids: set[bytes] = set()
        names: dict[str, None] = {}  # in the order of the file; complete if no row has a prompt column
        has_column, count = False, 0
        for location, row in self._rows():
            if not has_column:
                names |= dict.fromkeys(row)
                has_column = any(column in row for column in self._prompt_columns)
            with located(location):
                prompt, content = self._prompt(location, row)
            if not prompt.messages or _short_digest(content) in contents:
                skipped["duplicate" if prompt.messages else "empty"] += 1
                continue
            contents.add(_short_digest(content))
            if prompt.prompt_id != content[:16]:
                _require_unique_id(prompt, ids)
            count += 1
            yield prompt
            if count == self.limit:
                return
        if not has_column:
            raise self._no_prompts(list(names))

    def parent(self, output: Path) -> Parent:
        """The parent that an artifact at `output` records: a file by its bytes, a dataset by its prompts.

        Raises InputError for a missing file, and for one whose first row is no prompt, before its bytes are hashed.
        """
        register_input(self.path)
        if self._is_file:
            next(iter(self), None)
            return Parent("prompts", file_digest(self.path), relative_path(self.path, output))
        content = [
            [
                prompt.prompt_id,
                json_digest(prompt_content(prompt.messages, prompt.tools)),
                *filter(None, [prompt.teacher]),
            ]
            for prompt in self
        ]
        return Parent(HUB_DATASET, json_digest(content), str(self.path))

    @property
    def on_hub(self) -> bool:
        return not self._is_file and not file_mode(self.path)

    @property
    def _is_file(self) -> bool:
        return self.path.suffix.lower() in READERS and not stat.S_ISDIR(file_mode(self.path))

    @property
    def _prompt_columns(self) -> tuple[str, ...]:
        return (self.column,) if self.column else PROMPT_COLUMNS

    @property
    def _columns(self) -> tuple[str, ...]:
        return (*self._prompt_columns, *self._other_columns)

    @property
    def _other_columns(self) -> tuple[str, ...]:
        return (*OTHER_COLUMNS, *([self.teacher_by] if self.teacher_by else []))

    def _messages(self, row: PromptRow) -> Messages:
        """The messages of a row; empty for an empty prompt."""
        columns = self._prompt_columns
        column = next((name for name in columns if not is_empty_prompt(name, row.get(name))), columns[0])
        return read_messages(column, row.get(column))

    def _rows(self) -> Iterator[LocatedRow]:
        columns = self._columns
        if not self._is_file:
            rows = read_hub_dataset(self.path, self.config_name, self.split, columns)
            return (
                (f"{self.path}, row {number}", {name: without_padding(cell) for name, cell in row.items()})
                for number, row in enumerate(rows, 1)
            )
        require_regular_file(self.path, "prompts file")
        if self.config_name or self.split:
            raise InputError(
                f"{self.path} is a file: it has no configurations and splits.", "Leave out --config-name and --split."
            )
        return READERS[self.path.suffix.lower()](self.path, columns)

    def _prompt(self, location: str, row: PromptRow) -> tuple[Prompt, str]:
        """The prompt of a row, without messages if it is empty; and the hash of its messages and tools."""
        messages, tools = self._messages(row), read_tools(row.get("tools"))
        content = json_digest(prompt_content(messages, tools))
        prompt_id = _name(row, "prompt_id", content[:16])
        source = _name(row, "source", self.path.stem)
        teacher = self._teacher(row, source) if messages else ""
        if self.system is None or not messages or messages[0]["role"] == "system":
            return Prompt(prompt_id, source, messages, tools, location, teacher), content
        completed = [{"role": "system", "content": self.system}, *messages]
        return Prompt(prompt_id, source, completed, tools, location, teacher), content

    def _teacher(self, row: PromptRow, source: str) -> str:
        """The name of a prompt's teacher. Raises InputError."""
        column = self.teacher_by
        if column is None:
            return ""
        name = source if column == "source" else _name(row, column, "")
        if not name:
            missing = "is empty" if column in row else "does not exist"
            raise InputError(
                f"the column {column!r} {missing}, so that the prompt names no teacher.",
                f"Write a teacher's name, or choose with --teacher-by one of: {', '.join(row)}.",
            )
        by = f"the column {column!r}" if not is_missing(row.get(column)) else "the file, as the row has no 'source',"
        if not is_teacher_name(name):
            raise InputError(
                f"{by} names the teacher {name[:60]!r}, which no option can name.",
                f"Write at most {MAX_TEACHER_NAME} printable characters without =.",
            )
        if self.teachers and name not in self.teachers:
            raise InputError(
                f"{by} names the teacher {name!r}; the teachers are {', '.join(self.teachers)}.",
                f"Add --teacher {shlex.quote(f'{name}=MODEL')}, or correct the row.",
            )
        return name

    def _no_prompts(self, names: list[str]) -> InputError:
        """The error for a file without a prompt column; `names`: its columns, empty for a file without rows."""
        if not names:
            return InputError(f"{self.path} holds no prompts.", "Add rows, or name another file.")
        *others, last = map(repr, self._prompt_columns)
        missing = f"column {', '.join(others)} or {last}" if others else f"column {last}"
        return InputError(f"{self.path} has no {missing}.", f"Choose with --column one of: {', '.join(names)}.")


def _name(row: PromptRow, column: str, default: str) -> str:
    """The cell of an id or a source as text. Raises InputError."""
    cell = row.get(column)
    if is_missing(cell):
        return default
    if isinstance(cell, list | dict | bytes):
        raise InputError(f"{column!r} is neither text nor a number.", "Correct the row.")
    require_encodable(str(cell))
    return str(cell)


def _short_digest(digest: str) -> bytes:
    """The first 16 bytes of a hexadecimal digest."""
    return bytes.fromhex(digest[:32])


def _require_unique_id(prompt: Prompt, ids: set[bytes]) -> None:
    """Adds an id to `ids`. Raises InputError if `ids` holds it already."""
    digest = _short_digest(json_digest(prompt.prompt_id))
    if digest in ids:
        raise InputError(f"{prompt.location}: two prompts have the prompt_id {prompt.prompt_id!r}.", "Make ids unique.")
    ids.add(digest)
