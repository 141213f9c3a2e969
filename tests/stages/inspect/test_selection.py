"""The rules on numpy are those of the core, on whatever entropies there are."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tsdkd.core import AdaptiveOpener, TSDKDConfig, opener_mask, top_entropy_mask, uncertainty_gate
from tsdkd.core.metrics import _kendall_tau
from tsdkd.core.teacher import TeacherRanks
from tsdkd.stages.inspect.selection import (
    first_ranks,
    fraction_chooser,
    gate,
    kendall_tau,
    opener_length,
    select,
    top_entropy,
)

# Few distinct values make ties; tenths make sums that meet a boundary but for rounding.
VALUES = st.one_of(st.sampled_from([0.0, 0.1, 0.2, 1.0, 3.0]), st.floats(0, 12, width=32))
ENTROPIES = st.lists(VALUES, min_size=1, max_size=70).map(lambda values: np.array(values, dtype=np.float32))
SHARES = st.one_of(st.sampled_from([0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0]), st.floats(0.01, 1))


def as_batch(values: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """One row, and a mask of its response tokens."""
    row = torch.from_numpy(values).unsqueeze(0)
    return row, torch.ones_like(row, dtype=torch.bool)


@given(ENTROPIES, SHARES)
def test_the_opener(entropies: np.ndarray, share: float) -> None:
    assert opener_length(entropies, share) == int(opener_mask(*as_batch(entropies), share).sum())


@given(ENTROPIES, SHARES)
def test_the_most_uncertain(entropies: np.ndarray, share: float) -> None:
    assert top_entropy(entropies, share).tolist() == top_entropy_mask(*as_batch(entropies), share)[0].tolist()


@pytest.mark.parametrize(("length", "ratio", "count"), [(1, 0.1, 1), (30, 0.1, 3), (31, 0.1, 4), (100, 0.07, 7)])
def test_boundaries_that_binary_fractions_miss(length: int, ratio: float, count: int) -> None:
    """0.07 * 100 is 7.000000000000001 in binary; of equal positions the first are chosen."""
    equal = np.full(length, 0.7, dtype=np.float32)
    assert top_entropy(equal, ratio).nonzero()[0].tolist() == list(range(count))
    assert opener_length(equal, ratio) == count


def test_a_share_that_is_met_but_for_rounding() -> None:
    """The share that the first position holds, times the total, is more than the first position."""
    entropies = np.array([0.8, 0.4, 0.8, 0.3], dtype=np.float32)
    cumulated = entropies.astype(np.float64).cumsum()
    share = float(cumulated[0] / cumulated[-1])
    assert share * cumulated[-1] > cumulated[0]
    assert opener_length(entropies, share) == 1


@given(ENTROPIES, ENTROPIES, st.sampled_from([0.01, 0.5, 1.0, 4.0]))
def test_the_gate(one: np.ndarray, other: np.ndarray, tau: float) -> None:
    length = min(len(one), len(other))
    expected = uncertainty_gate(torch.from_numpy(one[:length]), torch.from_numpy(other[:length]), tau)
    assert gate(one[:length], other[:length], tau) == pytest.approx(expected.numpy(), abs=1e-5)


def test_a_gate_that_is_off_and_one_that_is_sure() -> None:
    student, teacher = np.array([4.0, 1.0], dtype=np.float32), np.array([1.0, 4.0], dtype=np.float32)
    assert select(student, teacher, TSDKDConfig(gate=False), 0.1).gate.tolist() == [1.0, 1.0]
    assert select(student, teacher, TSDKDConfig(), 0.1).gate == pytest.approx([0.9526, 0.0474], abs=1e-4)


@given(st.lists(st.permutations(range(6)), min_size=1, max_size=8), st.integers(2, 6))
def test_ranks_among_fewer_candidates_and_their_agreement(orders: list[list[int]], k: int) -> None:
    """Kendall's tau of the core takes the student's logits in the teacher's order."""
    ranks = np.array(orders, dtype=np.int16)
    fewer = first_ranks(ranks, k)
    ids = torch.arange(6).expand(len(orders), 6)
    ranked = TeacherRanks(torch.zeros(len(orders)), ids, torch.from_numpy(ranks).long()).ranked(torch.empty(0), k)
    assert [row.argsort().tolist() for row in fewer] == ranked.tolist()
    assert kendall_tau(fewer) == pytest.approx(_kendall_tau(-ranked.float()).numpy())


def test_the_adaptive_opener_looks_back() -> None:
    generator = np.random.default_rng(0)
    rows = [generator.uniform(0, 6, (2, 9)).astype(np.float32) for _ in range(12)]
    choose, core = fraction_chooser(TSDKDConfig(opener="adaptive")), AdaptiveOpener()
    pairs = [(torch.from_numpy(student), torch.from_numpy(teacher)) for student, teacher in rows]
    student, teacher = (torch.stack(side) for side in zip(*pairs, strict=True))
    expected = core.fraction(student, teacher, torch.ones_like(student, dtype=torch.bool)).tolist()
    assert len(set(expected)) > 1
    assert [choose(*row) for row in rows] == expected
