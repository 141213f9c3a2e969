"""Reading JSON from untrusted files: size, nesting and types are checked once, by annotations.

An annotation is a dataclass, TypedDict, Literal, union, `list`, `tuple[X, ...]`, `dict[str, X]`, a plain JSON type, or
`Annotated[X, rule]`, whose rule returns what is wrong with a value, or "".
"""

import json
import math
import os
import stat
from collections.abc import Iterable
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from io import BufferedReader, FileIO
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

from tsdkd.errors import ArtifactError, InputError

MAX_BYTES = 1 << 25
"""The largest JSON file; a manifest of 100,000 parts has half of it."""
MAX_DEPTH = 32
MAX_TEXT = 1 << 22
"""Characters of the longest string."""
INT64 = 1 << 63
REMEDY = "Restore the file, or remove the directory."


class Record(dict[str, Any]):
    """A JSON object that was read; a missing key is an ArtifactError."""

    def __missing__(self, key: str) -> Any:
        raise ArtifactError(
            f"An artifact records no {key!r}, which is needed here.", "Make the artifact again with --overwrite."
        )


def read_json(path: Path, annotation: Any = Any, remedy: str = REMEDY) -> Any:
    """The content of a JSON file as the annotated type.

    Raises FileNotFoundError, and ArtifactError for content that is not of this type.
    """
    try:
        return parse_json(read_regular_file(path), annotation)
    except ValueError as error:
        raise unreadable_error(path, error, remedy) from None


def unreadable_error(path: Path | str, error: Exception, remedy: str = REMEDY) -> ArtifactError:
    """The error for a file with wrong content."""
    return ArtifactError(f"{path} cannot be read ({error}).", remedy)


def read_regular_file(path: Path, max_bytes: int = MAX_BYTES) -> bytes:
    """Raises FileNotFoundError, and ValueError for a pipe, device or directory and for a file that is too large."""
    try:
        file = BufferedReader(FileIO(path, opener=_open_at_once))
    except IsADirectoryError:
        raise ValueError("a directory") from None
    with file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a regular file")
        content = file.read(min(max_bytes, status.st_size) + 1)  # a read takes memory for all bytes that it asks for
    if len(content) > max_bytes:
        raise ValueError(f"more than {max_bytes >> 20} MiB")
    return content


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a pipe would wait for its writer


def parse_json(content: bytes | str, annotation: Any = Any, *, finite: bool = True) -> Any:
    """JSON as the annotated type; `finite`: NaN and Infinity are refused. Raises ValueError."""
    try:
        text = content if isinstance(content, str) else content.decode()
        value = json.loads(text, object_pairs_hook=_make_record, parse_constant=_refuse_constant if finite else None)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    _require_bounded(value, finite)
    return conform(value, annotation)


def conform(value: Any, annotation: Any, name: str = "") -> Any:
    """A JSON value as the annotated type: lists become tuples, objects become dataclasses.

    A dataclass omits keys that it does not have; a TypedDict keeps them. `name`: the name of the value in messages.
    Raises ValueError.
    """
    if annotation is Any:
        return value
    if is_dataclass(annotation):
        return _read_dataclass(value, annotation, name)
    read = _read_typed_dict if is_typeddict(annotation) else _READ.get(get_origin(annotation), _read_plain)
    return read(value, annotation, name)


def _read_plain(value: Any, kind: type, name: str) -> Any:
    if kind is float:
        return _require(value, type(value) in {int, float}, "a number", name)
    return _require(value, type(value) is kind, kind.__name__, name)


def _read_annotated(value: Any, annotation: Any, name: str) -> Any:
    kind, *rules = get_args(annotation)
    result = conform(value, kind, name)
    for rule in rules:
        if problem := rule(result):
            raise ValueError(f"{name} {problem}")
    return result


def _read_literal(value: Any, annotation: Any, name: str) -> Any:
    words = get_args(annotation)
    holds = any(value == word and type(value) is type(word) for word in words)
    return _require(value, holds, f"one of {', '.join(map(repr, words))}", name)


def _read_list(value: Any, annotation: Any, name: str) -> Any:
    _require(value, isinstance(value, list | tuple), "a list", name)
    items = [conform(item, get_args(annotation)[0], f"{name}[{i}]") for i, item in enumerate(value)]
    return tuple(items) if get_origin(annotation) is tuple else items


def _read_mapping(value: Any, annotation: Any, name: str) -> Any:
    _require(value, isinstance(value, dict), "an object", name)
    kind = get_args(annotation)[1]
    return Record({key: conform(item, kind, _join_names(name, key)) for key, item in value.items()})


def _read_typed_dict(value: Any, annotation: Any, name: str) -> Any:
    _require(value, isinstance(value, dict), "an object", name)
    hints = _type_hints(annotation)
    return Record({key: conform(item, hints.get(key, Any), _join_names(name, key)) for key, item in value.items()})


def _read_dataclass(value: Any, kind: Any, name: str) -> Any:
    _require(value, isinstance(value, dict), "an object", name)
    hints, given = _type_hints(kind), {}
    for field in fields(kind):
        if field.name in value:
            given[field.name] = conform(value[field.name], hints[field.name], _join_names(name, field.name))
        elif field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"{_join_names(name, field.name)} is missing")
    try:
        return kind(**given)
    except InputError as error:  # raised by the dataclass itself
        raise ValueError(f"{name}: {error.cause}") from None


def _read_union(value: Any, annotation: Any, name: str) -> Any:
    members = get_args(annotation)
    if value is None and NoneType in members:
        return None
    problems = []
    for member in members:
        try:
            return conform(value, member, name)
        except ValueError as error:
            problems += [str(error)] if member is not NoneType else []
    raise ValueError("; ".join(problems))


_READ: dict[Any, Any] = {
    Annotated: _read_annotated,
    Literal: _read_literal,
    Union: _read_union,
    UnionType: _read_union,
    list: _read_list,
    tuple: _read_list,
    dict: _read_mapping,
}


def _require(value: Any, holds: bool, expected: str, name: str) -> Any:
    if not holds:
        shown = str(value)
        raise ValueError(f"{name or 'it'} is {shown[:60]}{'…' * (len(shown) > 60)}, not {expected}")
    return value


@cache
def _type_hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _join_names(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _make_record(pairs: list[tuple[str, Any]]) -> Record:
    record = Record(pairs)
    if len(record) < len(pairs):
        raise ValueError("a key twice in one object")
    return record


def _refuse_constant(word: str) -> Any:
    raise ValueError(f"{word}, which is not JSON")


def _require_bounded(root: Any, finite: bool) -> None:
    """Raises ValueError for deep nesting, long or undecodable text, and numbers that 64 bits do not hold."""
    level = [root]
    for _ in range(MAX_DEPTH):
        for item in level:
            _require_bounded_item(item, finite)
        level = [child for item in level for child in _children(item)]
        if not level:
            return
    raise ValueError("nested too deeply")


def _children(item: Any) -> Iterable[Any]:
    return (*item, *item.values()) if isinstance(item, dict) else item if isinstance(item, list) else ()


def _require_bounded_item(item: Any, finite: bool) -> None:
    if isinstance(item, str):
        if len(item) > MAX_TEXT:
            raise ValueError(f"a text of more than {MAX_TEXT:,} characters")
        item.encode()  # a lone surrogate raises UnicodeEncodeError, which is a ValueError
    elif isinstance(item, float) and finite and not math.isfinite(item):
        raise ValueError("a number that is not finite")
    elif isinstance(item, int) and not -INT64 <= item < INT64:
        raise ValueError("a number that 64 bits do not hold")
