"""The indirect loss: its direction, its Bradley-Terry case, and where its gradient goes."""

import itertools
import math

import pytest
import torch

from tsdkd.core import plackett_luce_nll, ranking_nll
from tsdkd.core.ranking import propose, rank_candidates
from tsdkd.errors import InputError


def test_two_tokens_raise_the_one_the_teacher_prefers() -> None:
    """Student logits (2, 1), the teacher prefers the second: loss 1.3133, gradient (+0.7311, -0.7311).

    The released code's prefix sum gives 0.3133 and the opposite gradient, which lowers the preferred token.
    """
    student = torch.tensor([2.0, 1.0, -50.0], requires_grad=True)
    loss = ranking_nll(student, torch.tensor([0.0, 1.0, 5.0]), k=2)
    loss.backward()
    assert loss.item() == pytest.approx(1.3133, abs=1e-4)
    assert student.grad.tolist() == pytest.approx([0.7311, -0.7311, 0.0], abs=1e-4)


def test_three_items_by_hand() -> None:
    """-log [ e^3/(e^3+e^2+e^1) * e^2/(e^2+e^1) * 1 ]"""
    expected = math.log(1 + math.exp(-1) + math.exp(-2)) + math.log(1 + math.exp(-1))
    assert plackett_luce_nll(torch.tensor([3.0, 2.0, 1.0])).item() == pytest.approx(expected, abs=1e-6)


def test_the_same_order_has_a_lower_loss_than_the_reversed_one() -> None:
    best_first = torch.tensor([4.0, 3.0, 2.0, 1.0, 0.0])
    assert plackett_luce_nll(best_first).item() == pytest.approx(1.613, abs=1e-3)
    assert plackett_luce_nll(best_first.flip(0)).item() == pytest.approx(11.613, abs=1e-3)


def test_probabilities_of_all_rankings_sum_to_one() -> None:
    scores = torch.tensor([0.3, -1.2, 2.0, 0.7], dtype=torch.float64)
    total = sum(plackett_luce_nll(scores[list(order)]).neg().exp() for order in itertools.permutations(range(4)))
    assert total.item() == pytest.approx(1.0)


def test_two_candidates_are_bradley_terry() -> None:
    """Proposition 1: -log sigmoid of the difference of logits."""
    torch.manual_seed(0)
    preferred, other = torch.randn(2, 20, dtype=torch.float64)
    found = plackett_luce_nll(torch.stack([preferred, other], -1))
    assert torch.allclose(found, -torch.nn.functional.logsigmoid(preferred - other))


def test_two_candidates_are_a_preference_over_sub_responses() -> None:
    """Proposition 1: the reward of a sub-response is its log-probability; with a common prefix only token t differs."""
    torch.manual_seed(1)
    prefix_log_prob = torch.tensor(-12.3, dtype=torch.float64)
    student = torch.randn(9, dtype=torch.float64)
    teacher = torch.randn(9, dtype=torch.float64)
    best, worse = rank_candidates(propose(student, 2), teacher).tolist()
    rewards = prefix_log_prob + student.log_softmax(-1)
    expected = -torch.nn.functional.logsigmoid(rewards[best] - rewards[worse])
    assert ranking_nll(student, teacher, 2).item() == pytest.approx(expected.item())


def test_the_student_proposes_and_the_teacher_only_ranks() -> None:
    student = torch.tensor([5.0, 4.0, 3.0, 0.0, 0.0])
    teacher = torch.tensor([1.0, 3.0, 2.0, 99.0, 98.0])  # its most likely tokens are not among the candidates
    assert propose(student, 3).tolist() == [0, 1, 2]
    assert rank_candidates(propose(student, 3), teacher).tolist() == [1, 2, 0]


def test_gradient_reaches_only_the_proposed_logits_of_the_student() -> None:
    torch.manual_seed(0)
    student = torch.randn(4, 30, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(4, 30, dtype=torch.float64, requires_grad=True)
    ranking_nll(student, teacher, 5).sum().backward()
    assert teacher.grad is None
    touched = student.grad != 0
    assert touched.sum(-1).tolist() == [5] * 4
    assert touched.gather(-1, propose(student, 5)).all()


def test_gradcheck() -> None:
    torch.manual_seed(0)
    scores = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(plackett_luce_nll, scores)


def test_huge_logits_stay_finite() -> None:
    scores = torch.tensor([-1e4, 1e4, 0.0], requires_grad=True)
    loss = plackett_luce_nll(scores)
    loss.backward()
    assert loss.item() == pytest.approx(2e4)
    assert torch.isfinite(scores.grad).all()


@pytest.mark.parametrize("k", [5, 6])
def test_k_must_be_below_the_vocabulary(k: int) -> None:
    with pytest.raises(InputError, match=f"k is {k}, but the vocabulary has only 5"):
        ranking_nll(torch.zeros(2, 5), torch.zeros(2, 5), k)
