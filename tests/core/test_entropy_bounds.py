"""Bounds of the entropy from K log-probabilities hold for every distribution, and are reached."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tsdkd.core.distributions import entropy_of
from tsdkd.core.entropy_bounds import entropy_bounds, estimated_entropy


@given(seed=st.integers(0, 10_000), scale=st.sampled_from([0.0, 0.1, 1.0, 3.0, 10.0]), k=st.integers(1, 30))
def test_the_entropy_lies_between_its_bounds(seed: int, scale: float, k: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    log_probs = (scale * torch.randn(5, 30, generator=generator)).log_softmax(-1)
    least, greatest = entropy_bounds(log_probs.topk(k).values, 30)
    exact, estimate = entropy_of(log_probs), estimated_entropy(least, greatest)
    assert (least <= exact + 1e-4).all()
    assert (exact <= greatest + 1e-4).all()
    assert (least <= estimate).all()
    assert (estimate <= greatest).all()


def test_both_bounds_are_reached() -> None:
    fewest = torch.tensor([0.4, 0.2, 0.2, 0.2, 0.0, 0.0, 0.0])  # as many others as possible have the K-th probability
    most = torch.tensor([0.4, 0.2, 0.08, 0.08, 0.08, 0.08, 0.08])
    for probs, bound in ((fewest, 0), (most, 1)):
        exact = entropy_of(probs.clamp(min=1e-30).log().unsqueeze(0))
        torch.testing.assert_close(entropy_bounds(probs[:2].log().unsqueeze(0), 7)[bound], exact)


@pytest.mark.parametrize("sure", [0.0, -1e-7])
def test_a_sure_teacher_has_no_entropy(sure: float) -> None:
    least, greatest = entropy_bounds(torch.tensor([[sure, -50.0]]), 1000)
    assert float(least) == pytest.approx(0, abs=1e-5)
    assert float(greatest) == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("exponent", [1.5, 2.0])
@pytest.mark.parametrize("k", [20, 64])
def test_the_estimate_is_close_where_probabilities_fall_as_in_language(exponent: float, k: int) -> None:
    """By a power of their rank. Either bound differs by more, at K = 20 the middle of both too."""
    log_probs = (-exponent * torch.arange(1, 20_001).log()).log_softmax(-1).unsqueeze(0)
    least, greatest = entropy_bounds(log_probs[:, :k], 20_000)
    exact, estimate = entropy_of(log_probs), estimated_entropy(least, greatest)
    assert float((estimate - exact).abs()) < 0.05
    if k == 20:
        assert float((estimate - exact).abs()) < float(((least + greatest) / 2 - exact).abs())
