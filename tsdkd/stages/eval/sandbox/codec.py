"""Values of built-in types as bytes: a tag, a length, a content. Decoding runs no code of the sender."""

import builtins
import math
import struct
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

MAX_BYTES = 1 << 24
MAX_VALUES = 1_000_000
MAX_DEPTH = 100

SEQUENCES: dict[bytes, Any] = {b"l": list, b"t": tuple, b"S": set, b"Z": frozenset, b"q": deque}
VIEWS: dict[bytes, Any] = {b"K": type({}.keys()), b"I": type({}.items())}
MAPPINGS: dict[bytes, Any] = {b"C": Counter, b"O": OrderedDict, b"d": dict}
NUMBERS = {("decimal", "Decimal"): b"D", ("fractions", "Fraction"): b"Q"}
"""Numbers of modules that not every process imports."""
_TAGS: list[tuple[Any, bytes]] = [
    (bool, b"?"),
    (int, b"i"),
    (float, b"f"),
    (complex, b"c"),
    (str, b"s"),
    (bytes, b"b"),
    (bytearray, b"a"),
    *((kind, tag) for tag, kind in (SEQUENCES | VIEWS | MAPPINGS).items()),
    (range, b"r"),
    (type(None), b"N"),
]
_LENGTH = struct.Struct(">I")
_FLOAT = struct.Struct(">d")
_REFERENCE = struct.Struct(">q")


class CodecError(ValueError):
    """A value is too large or too deep, or bytes are no value."""


def _int_bytes(value: int) -> bytes:
    number = int.__index__(value)
    return number.to_bytes(number.bit_length() // 8 + 1, signed=True)


def _float_of(content: bytes) -> float:
    (number,) = _FLOAT.unpack(content)
    return math.nan if math.isnan(number) else number  # one object, because [nan] == [nan] holds for one object


def _type_of(content: bytes) -> type:
    kind = getattr(builtins, content.decode())
    if not isinstance(kind, type):
        raise CodecError("no type")
    return kind


def _number_of(module: str, name: str) -> Callable[[bytes], Any]:
    return lambda content: getattr(import_module(module), name)(content.decode())


_CONTENTS: dict[bytes, tuple[Callable[[Any], bytes], Callable[[bytes], Any]]] = {
    b"N": (lambda _: b"", lambda _: None),
    b"?": (lambda value: bytes([value]), lambda content: content != b"\0"),
    b"i": (_int_bytes, lambda content: int.from_bytes(content, signed=True)),
    b"f": (_FLOAT.pack, _float_of),
    b"c": (
        lambda value: _FLOAT.pack(value.real) + _FLOAT.pack(value.imag),
        lambda content: complex(*(number for (number,) in _FLOAT.iter_unpack(content))),
    ),
    b"s": (
        lambda value: str.encode(value, errors="surrogatepass"),
        lambda content: content.decode(errors="surrogatepass"),
    ),
    b"b": (lambda value: bytes(memoryview(value)), bytes),
    b"a": (bytes, bytearray),
    b"y": (lambda value: value.__name__.encode(), _type_of),
    **{tag: (lambda value: str(value).encode(), _number_of(*names)) for names, tag in NUMBERS.items()},
}
"""How the values without items are written and read."""


class Encoder:
    """Encodes a value. `refer` returns the number of an object that is no value, or raises."""

    def __init__(self, refer: Callable[[Any], int]) -> None:
        self.refer = refer

    def encode(self, value: Any) -> bytes:
        """Raises CodecError when the value exceeds a limit."""
        self.output, self.values = bytearray(), 0
        self._write(value, 0)
        return bytes(self.output)

    def _write(self, value: Any, depth: int) -> None:
        self.values += 1
        if depth > MAX_DEPTH or self.values > MAX_VALUES or len(self.output) > MAX_BYTES:
            raise CodecError("the value is too large or nested too deeply")
        tag = _tag(type(value))  # type: ignore[arg-type]  # every class has a hash
        if kind := SEQUENCES.get(tag) or VIEWS.get(tag):
            self._write_items(tag, list(kind.__iter__(value)), depth)
        elif tag in MAPPINGS:
            self._write_items(tag, [part for item in dict.items(value) for part in item], depth)
        elif tag == b"r":
            self._write_items(tag, [value.start, value.stop, value.step], depth)
        elif tag == b"x" and isinstance(value, type) and vars(builtins).get(value.__name__) is value:
            self._write_bytes(b"y", _CONTENTS[b"y"][0](value))
        elif tag == b"x" and type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
            self._write(value.item(), depth + 1)
        elif tag == b"x":
            self._write_bytes(tag, _REFERENCE.pack(self.refer(value)) + type(value).__name__.encode())
        else:
            self._write_bytes(tag, _CONTENTS[tag][0](value))

    def _write_items(self, tag: bytes, items: list[Any], depth: int) -> None:
        if len(items) > MAX_VALUES:
            raise CodecError("the value is too large")
        self.output += tag + _LENGTH.pack(len(items))
        for item in items:
            self._write(item, depth + 1)

    def _write_bytes(self, tag: bytes, content: bytes) -> None:
        if len(content) > MAX_BYTES:
            raise CodecError("the value is too large")
        self.output += tag + _LENGTH.pack(len(content)) + content


class Decoder:
    """Decodes a value. `resolve` returns the object of a number and a class name."""

    def __init__(self, resolve: Callable[[int, str], Any]) -> None:
        self.resolve = resolve

    def decode(self, data: bytes) -> Any:
        """Raises CodecError when the bytes are no value within the limits."""
        if len(data) > 2 * MAX_BYTES:
            raise CodecError("the value is too large")
        self.data, self.position, self.values = data, 0, 0
        try:
            value = self._read(0)
        except CodecError:
            raise
        except Exception as error:  # a set of lists, text that is no number, ...
            raise CodecError(f"the bytes are no value ({type(error).__name__})") from None
        if self.position != len(data):
            raise CodecError("bytes follow the value")
        return value

    def _read(self, depth: int) -> Any:
        self.values += 1
        if depth > MAX_DEPTH or self.values > MAX_VALUES:
            raise CodecError("the value is too large or nested too deeply")
        tag = self._take(1)
        (length,) = _LENGTH.unpack(self._take(_LENGTH.size))
        if tag in SEQUENCES or tag in VIEWS or tag in MAPPINGS or tag == b"r":
            if length > len(self.data) - self.position:
                raise CodecError("the value is cut")
            items = [self._read(depth + 1) for _ in range(length)]
            if tag == b"r":
                return range(*items)
            if tag in SEQUENCES:
                return SEQUENCES[tag](items)
            if tag in VIEWS:
                return dict.fromkeys(items).keys() if tag == b"K" else dict(items).items()
            return MAPPINGS[tag](dict(zip(items[::2], items[1::2], strict=True)))
        content = self._take(length)
        if tag == b"x":
            (number,) = _REFERENCE.unpack(content[: _REFERENCE.size])
            return self.resolve(number, content[_REFERENCE.size :].decode(errors="replace"))
        return _CONTENTS[tag][1](content)

    def _take(self, length: int) -> bytes:
        taken = self.data[self.position : self.position + length]
        if len(taken) < length:
            raise CodecError("the value is cut")
        self.position += length
        return taken


@cache
def _tag(kind: type) -> bytes:
    """The tag of a type; a subclass has the tag of its built-in base, and other types have the tag of a reference."""
    if (kind.__module__, kind.__name__) in NUMBERS:
        return NUMBERS[kind.__module__, kind.__name__]
    return next((tag for base, tag in _TAGS if issubclass(kind, base)), b"x")
