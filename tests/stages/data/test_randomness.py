"""Random numbers that depend on a key alone. Stored artifacts depend on these values: they must not change."""

from hypothesis import given
from hypothesis import strategies as st

from tsdkd.stages.data.randomness import random_integer, random_uniform

keys = st.lists(st.one_of(st.integers(), st.text()), max_size=4)


def test_values_are_pinned() -> None:
    assert random_integer(0, "a-0") == 967_120_405_065_797_233
    assert random_uniform(0, "a") == 0.2896953134586566


@given(keys)
def test_ranges(key: list[int | str]) -> None:
    assert 0 <= random_integer(*key) < 2**60
    assert 0 <= random_uniform(*key) < 1


@given(keys)
def test_both_numbers_come_from_one_hash(key: list[int | str]) -> None:
    assert random_uniform(*key) == (random_integer(*key) >> 8) / 2**52


def test_the_mean_is_a_half() -> None:
    """1,000 numbers: within 4 standard deviations (0.037)."""
    assert abs(sum(random_uniform(0, i) for i in range(1000)) / 1000 - 0.5) < 0.037
