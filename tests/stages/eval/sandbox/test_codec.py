"""Values of built-in types arrive as they were sent, within limits; nothing else does."""

import math
import random
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from decimal import Decimal
from enum import IntEnum
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from tsdkd.stages.eval.sandbox import codec
from tsdkd.stages.eval.sandbox.codec import CodecError, Decoder, Encoder


def refuse(*_: Any) -> Any:
    raise CodecError("an object")


def sent(value: Any) -> Any:
    return Decoder(refuse).decode(Encoder(refuse).encode(value))


VALUES = [
    *(None, True, False, 0, 1, -1, 127, 128, -128, -129, 2**64, 0.0, -0.0, 1.0, 1e308, math.inf, -math.inf, 1j),
    *(complex(-0.0, math.inf), "", "é\n\0", "\ud800", b"", b"\0\xff", bytearray(b"x"), int, str, ValueError),
    *([], (), set(), frozenset(), {}, [1, (2.0, {3}), [None, True]], {"a": [1], (1, 2): {"b": frozenset({b"x"})}}),
    *(range(3), range(9, 0, -2), deque([1, 2]), Counter("aab"), OrderedDict(b=1, a=2)),
    *(Decimal("1.10"), Fraction(1, 3), dict.fromkeys("cab").keys(), {"b": [2], "a": 1}.items()),
]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_a_value_arrives_with_its_type(value: Any) -> None:
    assert repr(sent(value)) == repr(value)


def test_nan_arrives_as_one_object() -> None:
    assert sent([float("nan")]) == [math.nan]  # as in Python, where identical items are equal
    assert math.isnan(sent(float("nan")))


def test_a_number_of_many_digits_arrives() -> None:
    assert sent(-(10**5000)) == -(10**5000)


class Number(int):
    def __eq__(self, _: object) -> bool:
        return True

    __hash__ = int.__hash__


Point = namedtuple("Point", "x y")
SUBCLASSES = [
    (Number(3), 3),
    (IntEnum("Color", "RED").RED, 1),
    (Point(1, 2), (1, 2)),
    (defaultdict(list, a=[1]), {"a": [1]}),
    (np.int64(3), 3),
    (np.float64(0.5), 0.5),
    (np.bool_(True), True),
]


@pytest.mark.parametrize(("value", "plain"), SUBCLASSES, ids=lambda value: type(value).__name__)
def test_a_value_of_a_subclass_arrives_as_a_built_in(value: Any, plain: Any) -> None:
    assert type(sent(value)) is type(plain)
    assert plain == sent(value)


def test_large_and_deep_values_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "MAX_VALUES", 1000)
    monkeypatch.setattr(codec, "MAX_BYTES", 5000)
    nested: list[Any] = []
    nested.append(nested)
    for value in (nested, [0] * 1001, [[0] * 600] * 2, "x" * 5001, ["x" * 3000] * 3, 1 << 50_000):
        with pytest.raises(CodecError):
            Encoder(refuse).encode(value)


def test_bytes_that_are_no_value_are_refused() -> None:
    """Every cut, and 2,000 seeded changes: a value or CodecError, and no code runs."""
    data = Encoder(refuse).encode([{"a": (1, 2.0)}, {3, "b"}, range(4), Decimal(1), int])
    for end in range(len(data)):
        with pytest.raises(CodecError):
            Decoder(refuse).decode(data[:end])
    changes = random.Random(0)
    for _ in range(2000):
        changed = bytearray(data)
        changed[changes.randrange(len(data))] = changes.randrange(256)
        try:
            Decoder(refuse).decode(bytes(changed))
        except CodecError:
            continue


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"?", b"y\0\0\0\4eval", b"y\0\0\0\6nobody", b"S\0\0\0\1l\0\0\0\0", b"l\xff\xff\xff\xff"),
        *(b"N\0\0\0\0N\0\0\0\0", b"l\0\0\0\1" * 200 + b"N\0\0\0\0", b"d\0\0\0\1N\0\0\0\0", b"D\0\0\0\1x"),
        *(b"x\0\0\0\1x", b"r\0\0\0\0", b"*\0\0\0\0", b"I\0\0\0\1N\0\0\0\0"),
    ],
)
def test_malformed_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(CodecError):
        Decoder(refuse).decode(data)
