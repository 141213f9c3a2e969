"""The numpy selection equals the core's on random entropies."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tsdkd.core import AdaptiveOpener, TeacherRanks, TSDKDConfig, opener_mask, top_entropy_mask, uncertainty_gate
from tsdkd.core.metrics import _kendall_tau
from tsdkd.stages.inspect import numpy_selection

# Few distinct values make ties; tenths make sums that miss a boundary by rounding alone.
VALUES = st.one_of(st.sampled_from([0.0, 0.1, 0.2, 1.0, 3.0]), st.floats(0, 12, width=32))
ENTROPIES = st.lists(VALUES, min_size=1, max_size=70).map(lambda values: np.array(values, dtype=np.float32))
FRACTIONS = st.one_of(st.sampled_from([0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0]), st.floats(0.01, 1))


def as_batch(values: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch of one row, and its response mask."""
    row = torch.from_numpy(values).unsqueeze(0)
    return row, torch.ones_like(row, dtype=torch.bool)


@given(ENTROPIES, FRACTIONS)
def test_the_opener_equals_the_cores(entropies: np.ndarray, fraction: float) -> None:
    assert numpy_selection.opener_length(entropies, fraction) == int(opener_mask(*as_batch(entropies), fraction).sum())


@given(ENTROPIES, FRACTIONS)
def test_the_top_entropy_mask_equals_the_cores(entropies: np.ndarray, ratio: float) -> None:
    expected = top_entropy_mask(*as_batch(entropies), ratio)[0]
    assert numpy_selection.top_entropy_mask(entropies, ratio).tolist() == expected.tolist()


@pytest.mark.parametrize(("length", "ratio", "count"), [(1, 0.1, 1), (30, 0.1, 3), (31, 0.1, 4), (100, 0.07, 7)])
def test_binary_fractions_do_not_move_boundaries(length: int, ratio: float, count: int) -> None:
    """0.07 * 100 is 7.000000000000001 in binary; of equal entropies the first are selected."""
    equal = np.full(length, 0.7, dtype=np.float32)
    assert numpy_selection.top_entropy_mask(equal, ratio).nonzero()[0].tolist() == list(range(count))
    assert numpy_selection.opener_length(equal, ratio) == count


def test_rounding_does_not_lengthen_an_opener() -> None:
    """The first position's fraction of the total, times the total, exceeds the first position by rounding."""
    entropies = np.array([0.8, 0.4, 0.8, 0.3], dtype=np.float32)
    cumulated = entropies.astype(np.float64).cumsum()
    fraction = float(cumulated[0] / cumulated[-1])
    assert fraction * cumulated[-1] > cumulated[0]
    assert numpy_selection.opener_length(entropies, fraction) == 1


@given(ENTROPIES, ENTROPIES, st.sampled_from([0.01, 0.5, 1.0, 4.0]))
def test_the_gate_equals_the_cores(student: np.ndarray, teacher: np.ndarray, tau: float) -> None:
    length = min(len(student), len(teacher))
    student, teacher = student[:length], teacher[:length]
    expected = uncertainty_gate(torch.from_numpy(student), torch.from_numpy(teacher), tau)
    assert numpy_selection.gate_weights(student, teacher, tau) == pytest.approx(expected.numpy(), abs=1e-5)


def test_the_gate_can_be_off() -> None:
    student, teacher = np.array([4.0, 1.0], dtype=np.float32), np.array([1.0, 4.0], dtype=np.float32)
    off = numpy_selection.select_tokens(student, teacher, [len(student)], TSDKDConfig(gate=False), [0.1])
    assert off.gate.tolist() == [1.0, 1.0]
    on = numpy_selection.select_tokens(student, teacher, [len(student)], TSDKDConfig(), [0.1])
    assert on.gate == pytest.approx([0.9526, 0.0474], abs=1e-4)


@given(st.lists(st.permutations(range(6)), min_size=1, max_size=8), st.integers(2, 6))
def test_ranks_of_fewer_candidates_equal_the_cores(orders: list[list[int]], k: int) -> None:
    """The core's Kendall's tau takes the student's logits in the teacher's order."""
    ranks = np.array(orders, dtype=np.int16)
    fewer = numpy_selection.ranks_of_first(ranks, k)
    ids = torch.arange(6).expand(len(orders), 6)
    teacher = TeacherRanks(torch.zeros(len(orders)), ids, torch.from_numpy(ranks).long())
    ranked = teacher.ranked_candidates(torch.empty(0), k)
    assert [row.argsort().tolist() for row in fewer] == ranked.tolist()
    assert numpy_selection.kendall_tau(fewer) == pytest.approx(_kendall_tau(-ranked.float()).numpy())


def test_the_adaptive_opener_equals_the_cores() -> None:
    generator = np.random.default_rng(0)
    rows = [generator.uniform(0, 6, (2, 9)).astype(np.float32) for _ in range(12)]
    choose_fraction = numpy_selection.opener_fraction_chooser(TSDKDConfig(opener="adaptive"))
    pairs = [(torch.from_numpy(student), torch.from_numpy(teacher)) for student, teacher in rows]
    student, teacher = (torch.stack(side) for side in zip(*pairs, strict=True))
    expected = AdaptiveOpener().fraction(student, teacher, torch.ones_like(student, dtype=torch.bool)).tolist()
    assert len(set(expected)) > 1
    assert [choose_fraction(*row) for row in rows] == expected
