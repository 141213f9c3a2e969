"""Random logits of both models, and the objective's value and gradient on them."""

import torch

from tsdkd.core import TSDKDConfig, tsdkd_loss

VOCAB = 17
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def make(lengths: list[int], seed: int = 0, vocab: int = VOCAB) -> Batch:
    """Right-padded logits of both models and the mask."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths), vocab)
    student, teacher = (2 * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = torch.arange(max(lengths)).unsqueeze(0) < torch.tensor(lengths).unsqueeze(1)
    return student, teacher, mask


def value_and_gradient(batch: Batch, config: TSDKDConfig) -> tuple[torch.Tensor, torch.Tensor]:
    student, teacher, mask = batch
    student = student.clone().requires_grad_()
    loss, _ = tsdkd_loss(student, teacher, mask, config)
    loss.backward()
    return loss.detach(), student.grad
