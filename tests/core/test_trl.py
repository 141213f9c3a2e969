"""GKD's divergence is that of TRL, where TRL is installed (tests/core/test_distributions.py derives it by hand)."""

import pytest
import torch

from tsdkd.core import TSDKDConfig, tsdkd_loss


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_one_response_has_the_loss_and_gradient_of_trl(beta: float, temperature: float) -> None:
    trl = pytest.importorskip("trl.experimental.gkd.gkd_trainer", reason="TRL is not installed")
    generator = torch.Generator().manual_seed(0)
    student, teacher = (2 * torch.randn(1, 9, 31, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = torch.arange(9).unsqueeze(0) < 7
    config = TSDKDConfig(alpha=0, em_weight=0, gate=False, beta=beta, temperature=temperature)
    results = []
    for by_tsdkd in (True, False):
        leaf = student.clone().requires_grad_()
        labels = torch.where(mask, 1, -100)
        loss = (
            tsdkd_loss(leaf, teacher, mask, config)[0]
            if by_tsdkd
            else trl.GKDTrainer.generalized_jsd_loss(leaf, teacher, labels, beta, temperature)
        )
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    torch.testing.assert_close(*results)
