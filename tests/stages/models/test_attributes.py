"""Attributes are restored, also after an exception."""

from types import SimpleNamespace

import pytest

from tsdkd.stages.models.attributes import replaced_attribute


def test_an_attribute_is_replaced_and_restored() -> None:
    owner = SimpleNamespace(name="original")
    with pytest.raises(KeyError), replaced_attribute(owner, "name", "replaced"):
        assert owner.name == "replaced"
        raise KeyError
    assert owner.name == "original"
