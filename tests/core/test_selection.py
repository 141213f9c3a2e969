"""Selection: openers, uncertain tokens, gates, and the weights that they give."""

import pytest
import torch

from tsdkd.core import AdaptiveOpener, TSDKDConfig, opener_mask, select, top_entropy_mask, uncertainty_gate
from tsdkd.errors import InputError

MASK = torch.ones(1, 5, dtype=torch.bool)


def lengths(mask: torch.Tensor) -> list[int]:
    return mask.sum(-1).tolist()


@pytest.mark.parametrize(
    ("fraction", "length"), [(0.1, 1), (0.2, 1), (0.21, 2), (0.5, 3), (0.6, 3), (0.8, 4), (0.81, 5), (1.0, 5)]
)
def test_the_opener_is_the_shortest_prefix_with_its_fraction_of_entropy(fraction: float, length: int) -> None:
    """Five positions of entropy 1: position m holds the fraction m / 5, inclusively."""
    mask = opener_mask(torch.ones(1, 5, dtype=torch.float64), MASK, fraction)
    assert mask[0].tolist() == [True] * length + [False] * (5 - length)


def test_each_response_has_its_own_opener() -> None:
    entropy = torch.tensor([[9.0, 1, 1, 1, 1], [1, 1, 1, 1, 9], [1, 1, 1, 1, 1]])
    assert lengths(opener_mask(entropy, MASK.expand(3, 5), torch.tensor([0.5, 0.5, 0.2], dtype=torch.float64))) == [
        1,
        5,
        1,
    ]


def test_an_opener_of_fraction_1_includes_final_tokens_of_entropy_0() -> None:
    entropy = torch.tensor([[3.0, 1.0, 0.0, 0.0, 0.0]])
    assert lengths(opener_mask(entropy, MASK, 1.0)) == [5]
    assert lengths(opener_mask(entropy, MASK, 0.999)) == [2]


def test_a_response_without_any_entropy_has_an_opener_of_one() -> None:
    padded = torch.tensor([[False, False, True, True, False]])
    assert opener_mask(torch.zeros(1, 5), padded, 0.1).tolist() == [[False, False, True, False, False]]


def test_padding_is_neither_counted_nor_selected() -> None:
    entropy = torch.tensor([[50.0, 1.0, 1.0, 1.0, 50.0]])
    mask = torch.tensor([[False, True, True, True, False]])
    assert opener_mask(entropy, mask, 0.5).tolist() == [[False, True, True, False, False]]
    assert top_entropy_mask(entropy, mask, 0.5).tolist() == [[False, True, True, False, False]]


@pytest.mark.parametrize(
    ("length", "ratio", "count"),
    [
        (1, 0.1, 1),
        (5, 0.1, 1),
        (10, 0.1, 1),
        (11, 0.1, 2),
        (30, 0.1, 3),
        (71, 0.1, 8),
        (1000, 0.1, 100),
        (100, 0.07, 7),
    ],
)
def test_the_number_of_uncertain_positions_is_rounded_up_without_floating_error(
    length: int, ratio: float, count: int
) -> None:
    """0.07 * 100 is 7.000000000000001 in binary; the count is 7."""
    entropy = torch.rand(1, length, generator=torch.Generator().manual_seed(length))
    assert lengths(top_entropy_mask(entropy, torch.ones(1, length, dtype=torch.bool), ratio)) == [count]


def test_the_most_uncertain_positions_are_selected_and_ties_go_to_the_earlier() -> None:
    entropy = torch.tensor([[1.0, 7.0, 2.0, 7.0, 7.0]])
    assert top_entropy_mask(entropy, MASK, 0.4).tolist() == [[False, True, False, True, False]]


def test_the_gate_is_near_1_where_only_the_student_is_uncertain() -> None:
    gate = uncertainty_gate(torch.tensor([4.0, 1.0, 1.0]), torch.tensor([1.0, 1.0, 4.0]), tau=1.0)
    assert gate.tolist() == pytest.approx([0.9526, 0.5, 0.0474], abs=1e-4)
    sharper = uncertainty_gate(torch.tensor([4.0]), torch.tensor([1.0]), tau=0.5)
    assert sharper.item() == pytest.approx(0.99753, abs=1e-5)


def test_the_gate_carries_no_gradient() -> None:
    student = torch.tensor([2.0], requires_grad=True)
    assert not uncertainty_gate(student, torch.tensor([1.0]), 1.0).requires_grad


def test_weights_contain_every_normalisation() -> None:
    """Ten positions of entropy 1: an opener of 3, two uncertain positions, a gate of one half."""
    entropy = torch.ones(1, 10, dtype=torch.float64)
    config = TSDKDConfig(opener=0.3, em_ratio=0.2)
    weights = select(entropy, entropy, torch.ones(1, 10, dtype=torch.bool), config)
    assert weights.indirect[0].tolist() == pytest.approx([1 / 3] * 3 + [0] * 7)
    assert weights.entropy[0].tolist() == pytest.approx([1 / 2] * 2 + [0] * 8)
    assert weights.direct[0].tolist() == pytest.approx([0.5 / 10] * 10)
    summed = select(
        entropy, entropy, torch.ones(1, 10, dtype=torch.bool), TSDKDConfig(opener=0.3, indirect_reduction="sum")
    )
    assert summed.indirect[0].tolist() == [1] * 3 + [0] * 7


def test_no_selection_weights_all_tokens_alike() -> None:
    entropy = torch.rand(2, 6)
    weights = select(entropy, torch.rand(2, 6), torch.ones(2, 6, dtype=torch.bool), TSDKDConfig(gate=False, opener=1.0))
    assert torch.allclose(weights.direct, torch.full((2, 6), 1 / 6))
    assert torch.allclose(weights.indirect, torch.full((2, 6), 1 / 6))


def test_an_empty_response_is_named() -> None:
    mask = torch.tensor([[True, True], [False, False]])
    with pytest.raises(InputError, match="Row 1 has no response token"):
        select(torch.ones(2, 2), torch.ones(2, 2), mask, TSDKDConfig())


def test_adaptive_needs_fractions() -> None:
    with pytest.raises(InputError, match="adaptive"):
        select(torch.ones(1, 5), torch.ones(1, 5), MASK, TSDKDConfig(opener="adaptive"))


def gap(value: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Entropies whose sigmoid(mean gap) is `value`, with padding that must have no effect."""
    logit = torch.logit(torch.tensor(value, dtype=torch.float64))
    student = torch.stack([logit + 2, logit + 4, torch.tensor(99.0)]).unsqueeze(0)
    return student, torch.tensor([[2.0, 4.0, 0.0]]), torch.tensor([[True, True, False]])


@pytest.mark.parametrize(("uncertainty", "fraction"), [(0.1, 0.05), (0.3, 0.10), (0.6, 0.15), (0.9, 0.20)])
def test_adaptive_fraction_by_quarter(uncertainty: float, fraction: float) -> None:
    assert AdaptiveOpener().fraction(*gap(uncertainty)).tolist() == pytest.approx([fraction])


def test_adaptive_fraction_is_smoothed_over_this_and_four_before() -> None:
    """0.9 once, then 0.1: the means are .9, .5, .367, .3, .26 and, without the first, .1."""
    opener = AdaptiveOpener()
    found = [opener.fraction(*gap(value)).item() for value in (0.9, 0.1, 0.1, 0.1, 0.1, 0.1)]
    assert found == pytest.approx([0.20, 0.15, 0.10, 0.10, 0.10, 0.05])


def test_adaptive_state_survives_a_resume() -> None:
    first = AdaptiveOpener()
    first.fraction(*gap(0.9))
    resumed = AdaptiveOpener()
    resumed.load_state_dict(first.state_dict())
    assert resumed.fraction(*gap(0.3)).tolist() == first.fraction(*gap(0.3)).tolist() == pytest.approx([0.15])


def test_adaptive_takes_a_batch_as_a_sequence() -> None:
    one, many = AdaptiveOpener(), AdaptiveOpener()
    responses = [gap(value) for value in (0.9, 0.2, 0.4, 0.8)]
    batch = [torch.cat(column) for column in zip(*responses, strict=True)]
    assert many.fraction(*batch).tolist() == [one.fraction(*response).item() for response in responses]
