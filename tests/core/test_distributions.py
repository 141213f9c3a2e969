"""Entropy and divergence: values by hand, gradients by finite differences, finite values at extreme logits."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tsdkd.core import Divergence, entropy, generalized_jsd
from tsdkd.core.distributions import divergence_of, log_probs

# P = (1/2, 1/2), Q = (1/4, 3/4) as logits
P = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
Q = torch.tensor([0.25, 0.75], dtype=torch.float64).log() + 7.0  # a constant shift changes nothing


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def test_entropy_of_known_distributions() -> None:
    assert entropy(torch.zeros(8, dtype=torch.float64)).item() == pytest.approx(math.log(8))
    assert entropy(P).item() == pytest.approx(math.log(2))
    assert entropy(Q).item() == pytest.approx(-(0.25 * math.log(0.25) + 0.75 * math.log(0.75)))
    assert entropy(torch.tensor([100.0, 0.0, 0.0])).item() == pytest.approx(0.0, abs=1e-6)


def test_forward_and_reverse_kl_at_the_ends() -> None:
    """beta = 0 is KL(teacher || student), beta = 1 is KL(student || teacher)."""
    assert generalized_jsd(Q, P, 0.0).item() == pytest.approx(kl([0.5, 0.5], [0.25, 0.75]))
    assert generalized_jsd(Q, P, 1.0).item() == pytest.approx(kl([0.25, 0.75], [0.5, 0.5]))


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_jsd_is_equation_one(beta: float) -> None:
    teacher, student = [0.5, 0.5], [0.25, 0.75]
    mixture = [beta * t + (1 - beta) * s for t, s in zip(teacher, student, strict=True)]
    expected = beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture)
    assert generalized_jsd(Q, P, beta).item() == pytest.approx(expected)


def skewed(name: str, skew: float, student: torch.Tensor = Q, teacher: torch.Tensor = P) -> torch.Tensor:
    return divergence_of(log_probs(teacher), log_probs(student), getattr(Divergence, name)(skew))


def test_skew_kl_compares_the_teacher_with_a_mixture() -> None:
    """KL((1/2, 1/2) || 0.1 (1/2, 1/2) + 0.9 (1/4, 3/4)) = (ln(0.5/0.275) + ln(0.5/0.725)) / 2"""
    assert skewed("skew_kl", 0.1).item() == pytest.approx(0.1131372, abs=1e-6)


def test_skew_reverse_kl_compares_the_student_with_a_mixture() -> None:
    """KL((1/4, 3/4) || 0.9 (1/2, 1/2) + 0.1 (1/4, 3/4)) = ln(0.25/0.475) / 4 + 3 ln(0.75/0.525) / 4"""
    assert skewed("skew_reverse_kl", 0.1).item() == pytest.approx(0.1070427, abs=1e-6)


@pytest.mark.parametrize(("name", "end"), [("skew_kl", 0.0), ("skew_reverse_kl", 1.0)])
def test_without_skew_they_are_the_plain_kls(name: str, end: float) -> None:
    assert skewed(name, 1e-9).item() == pytest.approx(generalized_jsd(Q, P, end).item())


@pytest.mark.parametrize("name", ["skew_kl", "skew_reverse_kl"])
def test_skew_bounds_the_divergence_at_a_missing_token(name: str) -> None:
    """It is at most -ln(skew), where the plain KL is infinite."""
    apart = torch.tensor([[0.0, -1e4]]), torch.tensor([[-1e4, 0.0]])
    assert skewed(name, 0.1, *apart).item() == pytest.approx(math.log(10), abs=1e-5)


@pytest.mark.parametrize("name", ["skew_kl", "skew_reverse_kl"])
@pytest.mark.parametrize("skew", [0.1, 0.7])
def test_gradients_of_skew_divergences(name: str, skew: float) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 7, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: skewed(name, skew, s, teacher), student.requires_grad_())


@pytest.mark.parametrize("beta", [1e-4, 1 - 1e-4])
def test_the_ends_are_the_limits_of_their_direction(beta: float) -> None:
    """JSD(beta) / beta -> forward KL, and JSD(beta) / (1 - beta) -> reverse KL: the gradients keep their direction."""
    end = round(beta)
    scale = beta if end == 0 else 1 - beta
    assert generalized_jsd(Q, P, beta).item() / scale == pytest.approx(generalized_jsd(Q, P, end).item(), rel=1e-3)


@given(st.floats(0, 1), st.integers(0, 10_000))
def test_divergence_is_never_negative_and_zero_for_equals(beta: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    one, other = torch.randn(2, 5, 11, generator=generator, dtype=torch.float64)
    assert (generalized_jsd(one, other, beta) >= -1e-12).all()
    assert torch.allclose(generalized_jsd(one, one, beta), torch.zeros(5, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_gradients(beta: float) -> None:
    torch.manual_seed(0)
    student = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(3, 7, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: generalized_jsd(s, teacher, beta), student)
    assert torch.autograd.gradcheck(entropy, student)


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 1.0])
def test_huge_logits_stay_finite(beta: float) -> None:
    student = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4]], requires_grad=True)
    teacher = torch.tensor([[-1e4, 1e4, 0.0], [1e4, -1e4, 1e4]])
    value = generalized_jsd(student, teacher, beta).sum() + entropy(student).sum()
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(student.grad).all()


def test_half_precision_is_computed_in_float32() -> None:
    logits = torch.randn(4, 50_000, generator=torch.Generator().manual_seed(0))
    assert entropy(logits.bfloat16()).dtype == torch.float32
    assert torch.allclose(entropy(logits.bfloat16()), entropy(logits.bfloat16().float()))
