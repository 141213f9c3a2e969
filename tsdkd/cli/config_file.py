"""`--config FILE`: a YAML file of options, by name; the command line wins over it."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from inspect import Parameter
from math import inf, isfinite, nan
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from typer.models import OptionInfo

from tsdkd.artifacts.regular_files import MAX_TEXT, require_regular_file
from tsdkd.cli.app import SWITCHED_OFF
from tsdkd.errors import InputError, nearest
from tsdkd.stages.config.groups import COMMON
from tsdkd.stages.config.option import parameter_name, union_members
from tsdkd.stages.config.recorded import COMMAND_LINE_ONLY


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
        if isinstance(value, list | dict) and self.info.metavar in {"NAMES", "JSON"}:
            return json.dumps(value) if self.info.metavar == "JSON" else ",".join(_words(value))
        is_number_allowed = self.info.metavar == "X" and isinstance(value, int | float) and not isinstance(value, bool)
        if not (isinstance(value, str) or is_number_allowed):
            raise ValueError("a number, or a word" if self.info.metavar == "X" else "a word; put a number in quotes")
        return str(value)

    def _number(self, value: Any) -> int | float:
        low, high = self.info.min, self.info.max
        form = "a whole number" if self.type is int else "a number"
        form += f" from {low:g}" if low is not None else ""
        form += f" to {high:g}" if high is not None else ""
        is_number = isinstance(value, int | float | str if self.type is float else int)
        try:
            number = float(value) if is_number else nan  # YAML reads 5e-6, without a dot, as a word
        except (ValueError, OverflowError):
            number = nan
        is_in_range = (-inf if low is None else low) <= number <= (inf if high is None else high)
        if isinstance(value, bool) or not (is_in_range and isfinite(number)):
            raise ValueError(form)
        return value if isinstance(value, int) else number


def config_file_parameter(parameters: Iterable[Parameter]) -> Parameter:
    """The parameter --config of a command that has these `parameters`."""
    keys = {parameter.name: key for parameter in parameters if (key := FileKey.of(parameter))}

    def load(context: typer.Context, value: Path | None) -> Path | None:
        if value is not None and not context.resilient_parsing:
            values = _read(value, keys, str(context.info_name))
            switched_off = context.meta.get(SWITCHED_OFF, ())
            values = {name: content for name, content in values.items() if name not in switched_off}
            context.default_map = {**(context.default_map or {}), **values}
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
    values: dict[str, Any] = {}
    seen: set[str] = set()
    for key, value in _pairs(file):
        name = parameter_name(str(key))
        if name not in keys:
            near = keys[nearest(name, keys)].name
            raise InputError(
                f"{file}: `tsdkd {command}` has no option {key!r}.",
                f"The nearest is {near!r}; `tsdkd {command} --help` lists all.",
            )
        if keys[name].name in COMMAND_LINE_ONLY:
            raise InputError(
                f"{file}: {key} {COMMAND_LINE_ONLY[keys[name].name]}, so no file may give it.",
                f"Give --{keys[name].name} on the command line.",
            )
        if name in seen:
            raise InputError(f"{file} gives {keys[name].name} twice.", "Give it once.")
        seen.add(name)
        if value is None:
            continue
        try:
            values[name] = keys[name].convert(value)
        except ValueError as error:
            raise InputError(f"{file}: {keys[name].name} is {value!r}.", f"Give {error}.") from None
    return values


def _pairs(file: Path) -> list[tuple[Any, Any]]:
    """Keys and values in their order; a key that stands twice appears twice."""
    import yaml

    class Loader(yaml.SafeLoader):
        """YAML whose whole numbers are decimal: YAML 1.1 reads 010 as 8 and 1:30 as 90."""

    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":int", ":float", ":timestamp"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9][0-9]*)$"), list("-+0123456789"))
    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?([0-9]+\.[0-9]*([eE][-+]?[0-9]+)?|\.[0-9]+([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)$"),
        list("-+.0123456789"),
    )
    require_regular_file(file, "file of options", MAX_TEXT)
    try:
        loader = Loader(file.read_text(encoding="utf-8-sig"))
        node = loader.get_single_node()
        if isinstance(node, yaml.MappingNode):
            return [
                (loader.construct_object(key, deep=True), loader.construct_object(value, deep=True))
                for key, value in node.value
            ]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read: {getattr(error, 'strerror', error)}.", "Name a YAML file.") from None
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:  # a number of 5,000 digits; deep nesting
        raise InputError(
            f"{file} is not YAML: {' '.join(str(error).split())}.", "Write lines such as `k: 10`."
        ) from None
    if node is None:
        return []
    raise InputError(f"{file} holds no options.", "Write lines such as `k: 10`.")


def _words(value: Any) -> list[str]:
    items = value if isinstance(value, list) else [value]
    if not all(isinstance(item, str) for item in items):
        raise ValueError("a list of words")
    return items
