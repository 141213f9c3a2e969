"""Attributes are restored, also after an exception."""

from types import SimpleNamespace

import pytest

from tsdkd.stages.models.attributes import replaced_attribute


def test_an_attribute_is_replaced_and_restored() -> None:
    owner = SimpleNamespace(name="original")

    def fail() -> None:
        with replaced_attribute(owner, "name", "replaced"):
            raise KeyError(owner.name)

    with pytest.raises(KeyError, match="replaced"):
        fail()
    assert owner.name == "original"
