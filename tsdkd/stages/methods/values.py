"""The options of methods: their names, their values and how values are written. Imports no torch."""

import re
from collections.abc import Mapping
from math import isfinite
from typing import Any, TypeAlias

from tsdkd.errors import InputError

OptionValue: TypeAlias = bool | int | float | str
Options: TypeAlias = Mapping[str, Any]
"""Values by name, of the defaults' types."""
_NAME = re.compile("[A-Za-z][A-Za-z0-9_.-]{0,59}")
_BOOLEANS = {"true": True, "false": False}


def require_name(noun: str, name: str) -> None:
    """Raise InputError for a name that does not fit on a command line and in a log."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InputError(
            f"The {noun} is named {name!r:.80}.",
            "Begin with a letter; use up to 60 letters, digits, '-', '_' and '.'.",
        )


def require_default(name: str, default: object) -> None:
    """Raise InputError for a default whose type no option has."""
    if not isinstance(default, bool | int | float | str):
        raise InputError(
            f"The option {name} has the default {default!r:.80}.", "Give true or false, a number, or a word."
        )


def parse_option(name: str, text: str, default: OptionValue) -> OptionValue:
    """The value that `text` writes, of the default's type. Raises InputError."""
    kind = type(default)
    try:
        value = _BOOLEANS[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
        value = None
    if value is None or (isinstance(value, float) and not isfinite(value)):
        expected = {bool: "true or false", int: "a whole number", float: "a number"}[kind]
        raise InputError(
            f"--method-option {name} is {text!r}.", f"Give {expected}, such as {option_text(name, default)}."
        )
    return value


def option_text(name: str, value: OptionValue) -> str:
    """NAME=VALUE, as the command line takes it."""
    return f"{name}={str(value).lower() if isinstance(value, bool) else value}"
