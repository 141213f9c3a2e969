"""Options: a field of a configuration declares the option's name, default, range, help and group, once.

The command line, YAML files, rebuilt commands and the reference are made from these declarations.
"""

import keyword
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from tsdkd.errors import InputError
from tsdkd.stages.config.groups import COMMON

_OPTION, _NESTED = "option", "nested"


LARGEST_INTEGER, SMALLEST_NUMBER = 2**31 - 1, 1e-30


@dataclass(frozen=True, slots=True)
class Option:
    """How a field appears on the command line, in YAML and in the reference."""

    help: str
    group: str
    name: str = ""
    """Without dashes; "": the field's name."""
    min: float | None = None
    max: float | None = None
    metavar: str = ""
    """"": chosen by type."""
    shown: str = ""
    """The default in words; "": its value."""
    common: bool = False
    """True: help shows it among the common options."""
    repeatable: bool = False
    """Of a tuple: one value each time the option is given; False: values are joined by commas."""


@dataclass(frozen=True, slots=True)
class Nested:
    """How the fields of an inner configuration appear."""

    kind: type
    options: Mapping[str, Option]
    switch: Option | None
    """The option that switches the inner configuration on."""
    whole: bool
    """Whether the configurations inside it appear too."""


def option(
    default: Any,
    help_: str,
    *,
    group: str,
    name: str = "",
    min_: float | None = None,
    max_: float | None = None,
    metavar: str = "",
    shown: str = "",
    common: bool = False,
    repeatable: bool = False,
) -> Any:
    """A dataclass field with its option; `Option` explains the arguments."""
    declared = Option(help_, group, name, min_, max_, metavar, shown, common, repeatable)
    return field(default=default, metadata={_OPTION: declared})


def nested(
    kind: type,
    *,
    default: Any = MISSING,
    default_factory: Any = MISSING,
    options: Mapping[str, Option] | None = None,
    switch: Option | None = None,
) -> Any:
    """A dataclass field that holds another configuration, whose `options` join those of the outer one.

    `options`: by field name; None: as `kind` and the configurations inside it declare them.
    """
    declared = Nested(kind, options or declared_options(kind), switch, whole=options is None)
    if default is MISSING and default_factory is MISSING:
        default_factory = kind
    nested_field: Any = field(default=default, default_factory=default_factory, metadata={_NESTED: declared})
    return nested_field


def declared_options(kind: type) -> dict[str, Option]:
    """The options of a configuration's own fields, by field name."""
    return {f.name: f.metadata[_OPTION] for f in _fields(kind) if _OPTION in f.metadata}


def reuse(kind: type, names: tuple[str, ...], group: str, **changes: Mapping[str, Any]) -> dict[str, Option]:
    """Some options of `kind` in another group; `changes`: attributes of `Option` by field name."""
    declared = declared_options(kind)
    return {name: replace(declared[name], group=group, common=False, **dict(changes.get(name, {}))) for name in names}


def default_in_words(usual: float, defaults: Mapping[str, float]) -> str:
    """`shown` of an option whose default depends on the method, with the methods that have another default."""
    others = sorted({value for value in defaults.values() if value != usual})
    named = [f"{other:g} with {', '.join(n for n, value in defaults.items() if value == other)}" for other in others]
    return "; ".join([f"{usual:g}", *named])


@dataclass(frozen=True, slots=True)
class ConfigOption:
    """An option of a configuration, with the field that it sets."""

    key: str
    """The field's dotted name, such as "online.sampling.top_p"."""
    type: Any
    default: Any
    option: Option

    @property
    def name(self) -> str:
        """Without dashes in front."""
        return self.option.name or self.key.rsplit(".", 1)[-1].replace("_", "-")

    @property
    def parameter(self) -> str:
        """The name of a Python parameter that holds the value."""
        return parameter_name(self.name)

    @property
    def group(self) -> str:
        return COMMON if self.option.common else self.option.group

    @property
    def choices(self) -> tuple[str, ...]:
        """The allowed words; empty for an option that takes other values too."""
        (only, *others) = (member for member in union_members(self.type) if member is not NoneType)
        return get_args(only) if get_origin(only) is Literal and not others else ()

    @property
    def is_tuple(self) -> bool:
        return get_origin(self.type) is tuple

    @property
    def is_number_or_word(self) -> bool:
        """Whether the value is a number or one word, such as "adaptive"."""
        members = union_members(self.type)
        return float in members and any(get_origin(member) is Literal for member in members)

    def parse(self, value: Any) -> Any:
        """The field's value from the option's. Raises InputError."""
        if self.is_tuple:
            return tuple(value.split(",")) if isinstance(value, str) and value else tuple(value or ())
        if self.is_number_or_word and isinstance(value, str):
            value = _number_or_word(self, value)
        if isinstance(value, int | float):
            _require_usable_number(self.name, value)
        return value


def parameter_name(option_name: str) -> str:
    name = option_name.replace("-", "_")
    return f"{name}_" if keyword.iskeyword(name) or name in {"compile", "format"} else name


def config_options(kind: Any) -> tuple[ConfigOption, ...]:
    """Every option of a configuration and of those inside it, in the order of the fields."""
    return _config_options(kind)


@cache
def _config_options(kind: Any) -> tuple[ConfigOption, ...]:
    return tuple(_walk(kind, declared_options(kind), ""))


def build(kind: type, values: Mapping[str, Any], prefix: str = "") -> Any:
    """A configuration from values by dotted key; fields without a value keep their defaults. Raises InputError."""
    given = {}
    for f in _fields(kind):
        key = f"{prefix}{f.name}"
        if key in values:
            given[f.name] = values[key]
        elif any(name.startswith(f"{key}.") for name in values):
            given[f.name] = build(f.metadata[_NESTED].kind, values, f"{key}.")
    return kind(**given)


def _walk(
    kind: type, options: Mapping[str, Option], prefix: str, instance: Any = None, *, whole: bool = True
) -> Iterator[ConfigOption]:
    """`instance`: holds the defaults; None: the fields declare them. `whole`: as of `Nested`."""
    hints = get_type_hints(kind)
    for f in _fields(kind):
        default = _default(f) if instance is None else getattr(instance, f.name)
        if f.name in options:
            yield ConfigOption(f"{prefix}{f.name}", hints[f.name], default, options[f.name])
        if whole and (inner := f.metadata.get(_NESTED)):
            if inner.switch:
                yield ConfigOption(f"{prefix}{f.name}", bool, default is not None, inner.switch)
            yield from _walk(inner.kind, inner.options, f"{prefix}{f.name}.", default, whole=inner.whole)


def _default(field_: Field[Any]) -> Any:
    return field_.default if field_.default_factory is MISSING else field_.default_factory()


def _fields(kind: Any) -> tuple[Field[Any], ...]:
    return fields(kind)


def union_members(type_: Any) -> tuple[Any, ...]:
    """The members of a union; any other type is its only member."""
    return get_args(type_) if get_origin(type_) in {Union, UnionType} else (type_,)


def _require_usable_number(name: str, value: float) -> None:
    """Raises InputError for NaN, and for numbers that are too large or too small for float32 or int32."""
    if isinstance(value, int) and value > LARGEST_INTEGER:
        raise InputError(f"--{name} is {value}.", f"Choose a number up to {LARGEST_INTEGER}.")
    if not (value == 0 or SMALLEST_NUMBER <= abs(value) <= 1 / SMALLEST_NUMBER):
        raise InputError(
            f"--{name} is {value}.", f"Choose 0 or a number between {SMALLEST_NUMBER:g} and {1 / SMALLEST_NUMBER:g}."
        )


def _number_or_word(config_option: ConfigOption, value: str) -> float | str:
    words = [
        word
        for member in union_members(config_option.type)
        if get_origin(member) is Literal
        for word in get_args(member)
    ]
    if value in words:
        return value
    try:
        return float(value)
    except ValueError:
        raise InputError(
            f"--{config_option.name} is {value!r}.", f"Give a number such as 0.1, or {' or '.join(words)}."
        ) from None
