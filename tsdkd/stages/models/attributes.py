"""Temporary replacement of an attribute."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def replaced_attribute(owner: object, name: str, value: object) -> Iterator[None]:
    """Set an attribute of an object or module inside the context, and restore it afterwards."""
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)
