"""Methods from elsewhere: a file that the user names, or an installed package with the entry point `tsdkd.methods`."""

import hashlib
import sys
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from tsdkd.errors import InputError, TsdkdError, first_line

ENTRY_POINTS = "tsdkd.methods"
METHOD_FILE = "method.py"
"""The copy of a user's method in a checkpoint."""
_MAX_BYTES = 1_000_000


@dataclass(frozen=True, slots=True)
class MethodOrigin:
    """The file of a method, or the installed distribution that holds it."""

    recorded: dict[str, str]
    """What a checkpoint records of it, as part of its identity."""
    content: bytes | None = None
    """The bytes of the file."""

    def __str__(self) -> str:
        return " ".join(self.recorded.values())


def is_file_name(name: str) -> bool:
    """Whether a method's name names a file: it ends in .py or has a directory."""
    return name.endswith(".py") or "/" in name


def load_file(name: str) -> tuple[Any, MethodOrigin]:
    """Run a Python file. Returns its `METHOD` and its origin; the same content is run once in a process.

    Raises InputError for a file that cannot be read or run, or has no `METHOD`.
    """
    path = Path(name)
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise InputError(
            f"The method {name} cannot be read ({error.strerror}).", "Name a Python file, or a method of tsdkd."
        ) from None
    if len(content) > _MAX_BYTES:
        raise InputError(f"{name} has more than {_MAX_BYTES:,} bytes.", "Name a Python file with a METHOD.")
    digest = hashlib.sha256(content).hexdigest()
    module_name = f"tsdkd_method_{digest[:16]}"
    if module_name not in sys.modules:
        module = ModuleType(module_name)
        module.__file__ = str(path)
        sys.modules[module_name] = module  # dataclasses look their module up
        try:
            exec(compile(content, str(path), "exec"), module.__dict__)
        except BaseException as error:
            del sys.modules[module_name]
            if isinstance(error, TsdkdError) or not isinstance(error, Exception):
                raise
            raise InputError(
                f"{name} cannot be run ({type(error).__name__}: {first_line(error)}).",
                "Correct it; `tsdkd --debug` shows where it fails.",
            ) from error
    method = getattr(sys.modules[module_name], "METHOD", None)
    return method, MethodOrigin({"sha256": digest}, content)


def installed() -> dict[str, EntryPoint]:
    """The entry points of installed packages, by the name of the method."""
    return {entry.name: entry for entry in entry_points(group=ENTRY_POINTS)}


def load_installed(entry: EntryPoint) -> tuple[Any, MethodOrigin]:
    """The method of an installed package. Raises InputError for one that cannot be loaded."""
    try:
        method = entry.load()
    except Exception as error:
        raise InputError(
            f"The method {entry.name} of {entry.value} cannot be loaded ({type(error).__name__}: {first_line(error)}).",
            "Repair or remove its package.",
        ) from error
    recorded = {"entry_point": entry.value}
    if entry.dist is not None:
        recorded = {"distribution": entry.dist.name, "version": entry.dist.version}
    return method, MethodOrigin(recorded)
