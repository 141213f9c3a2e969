"""Rules of values that a manifest holds, as annotations; see json_files.py."""

from collections import Counter
from collections.abc import Callable, Sequence
from datetime import date
from re import fullmatch
from typing import Annotated, Any

from tsdkd.artifacts.files import NO_PARTS

MAX_WORD, MAX_PATH, MAX_NAME = 256, 4096, 255
Rule = Callable[[Any], str]
"""Returns what is wrong with a value, or ""."""


def _not_negative(number: float) -> str:
    return f"is {number}, less than 0" if number < 0 else ""


def _is_word(text: str) -> str:
    return "" if len(text) <= MAX_WORD and text.isprintable() else "is not a short printable text"


def _is_sha256(text: str) -> str:
    return "" if fullmatch("[0-9a-f]{64}", text) else f"is {text[:80]!r}, not a SHA-256"


def _is_path(text: str) -> str:
    too_long = len(text.encode()) > MAX_PATH or any(len(name.encode()) > MAX_NAME for name in text.split("/"))
    return "is not the name of a file" if "\0" in text or too_long else ""


def _is_date(text: str) -> str:
    try:
        date.fromisoformat(text)
    except ValueError:
        return f"is {text[:80]!r}, not a date such as 2026-11-27"
    return ""


def _is_part_name(text: str) -> str:
    """A part lies inside its artifact: in the directory itself, or in a plain directory of it."""
    names = text.split("/")
    plain = text.isprintable() and "\\" not in text and not _is_path(text) and not {"", ".", ".."} & {*names}
    if plain and names[0] not in NO_PARTS and not text.endswith(".tmp"):
        return ""
    return f"is {text[:80]!r}, which cannot name a part"


def all_differ(attribute: str) -> Rule:
    """The rule that no two items have the same value of an attribute."""

    def rule(items: Sequence[object]) -> str:
        counts = Counter(getattr(item, attribute) for item in items)
        twice = next((value for value, count in counts.items() if count > 1), None)
        return "" if twice is None else f"has {attribute} {twice!r} twice"

    return rule


Count = Annotated[int, _not_negative]
Amount = Annotated[float, _not_negative]
Word = Annotated[str, _is_word]
Sha256 = Annotated[str, _is_sha256]
PathText = Annotated[str, _is_path]
"""The path of a file, or the name of a model or dataset on the hub."""
Date = Annotated[str, _is_date]
PartName = Annotated[str, _is_part_name]
