"""`--config FILE`: a YAML file of options, by name; the command line wins over it."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from inspect import Parameter
from math import inf, nan
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from typer.models import OptionInfo

from tsdkd.errors import InputError
from tsdkd.stages.config.groups import COMMON
from tsdkd.stages.config.option import parameter_name, union_members


@dataclass(frozen=True, slots=True)
class FileKey:
    """One key of a file: the name, type and declaration of its option."""

    name: str
    """The option's name without dashes."""
    type: Any
    """The parameter's type without None."""
    info: OptionInfo

    @classmethod
    def of(cls, parameter: Parameter) -> "FileKey | None":
        """The key of a parameter; None for an argument."""
        if get_origin(parameter.annotation) is not Annotated:
            return None
        type_, info = get_args(parameter.annotation)[:2]
        if not isinstance(info, OptionInfo):
            return None
        declared = [info.default] if isinstance(info.default, str) else []
        long = [name for name in (*declared, *(info.param_decls or ())) if name.startswith("--")]
        name = long[0].split("/")[0].lstrip("-") if long else parameter.name.replace("_", "-")
        return cls(name, next(member for member in union_members(type_) if member is not NoneType), info)

    def convert(self, value: Any) -> Any:
        """The value as the parser takes it. Raises ValueError, with the expected form in words."""
        if get_origin(self.type) is list:
            return _words(value)
        if get_origin(self.type) is Literal:
            if value not in get_args(self.type):
                raise ValueError(f"one of {', '.join(get_args(self.type))}")
            return value
        if self.type is bool:
            if not isinstance(value, bool):
                raise ValueError("true or false")
            return value
        if self.type in {int, float}:
            return self._number(value)
        if isinstance(value, list) and self.info.metavar == "NAMES":
            return ",".join(_words(value))
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise ValueError("a word")  # noqa: TRY004
        return str(value)

    def _number(self, value: Any) -> int | float:
        low, high = self.info.min, self.info.max
        form = "a whole number" if self.type is int else "a number"
        form += f" from {low:g}" if low is not None else ""
        form += f" to {high:g}" if high is not None else ""
        is_number = isinstance(value, int | float | str if self.type is float else int)
        try:
            number = float(value) if is_number else nan  # YAML reads 5e-6, without a dot, as a word
        except ValueError:
            number = nan
        is_in_range = (-inf if low is None else low) <= number <= (inf if high is None else high)
        if isinstance(value, bool) or not is_in_range:
            raise ValueError(form)
        return value if isinstance(value, int) else number


def config_file_parameter(parameters: Iterable[Parameter]) -> Parameter:
    """The parameter --config of a command that has these `parameters`."""
    keys = {parameter.name: key for parameter in parameters if (key := FileKey.of(parameter))}

    def load(context: typer.Context, value: Path | None) -> Path | None:
        if value is not None and not context.resilient_parsing:
            context.default_map = {**(context.default_map or {}), **_read(value, keys, str(context.info_name))}
        return value

    declared = typer.Option(
        "--config",
        metavar="FILE",
        help="YAML file of options; the command line wins over it.",
        is_eager=True,
        callback=load,
        rich_help_panel=COMMON,
    )
    return Parameter("config_file", Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[Path | None, declared])


def _read(file: Path, keys: dict[str, FileKey], command: str) -> dict[str, Any]:
    """Values by parameter name; null leaves an option out. Raises InputError, naming the key."""
    values = {}
    for key, value in _mapping(file).items():
        name = parameter_name(str(key))
        if name not in keys:
            near = keys[difflib.get_close_matches(name, keys, 1, 0)[0]].name
            raise InputError(
                f"{file}: `tsdkd {command}` has no option {key!r}.",
                f"The nearest is {near!r}; `tsdkd {command} --help` lists all.",
            )
        if value is None:
            continue
        try:
            values[name] = keys[name].convert(value)
        except ValueError as error:
            raise InputError(f"{file}: {keys[name].name} is {value!r}.", f"Give {error}.") from None
    return values


def _mapping(file: Path) -> dict[Any, Any]:
    import yaml

    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read: {getattr(error, 'strerror', error)}.", "Name a YAML file.") from None
    except yaml.YAMLError as error:
        raise InputError(
            f"{file} is not YAML: {' '.join(str(error).split())}.", "Write lines such as `k: 10`."
        ) from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise InputError(f"{file} holds no options.", "Write lines such as `k: 10`.")
    return content


def _words(value: Any) -> list[str]:
    items = value if isinstance(value, list) else [value]
    if not all(isinstance(item, str) for item in items):
        raise ValueError("a list of words")
    return items
