"""The rows of objective.py: inputs, and the implementations of the objective and of its peers that work on them."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tsdkd.core import Head, TeacherHidden, TSDKDConfig, token_selective_loss_from_hidden, tsdkd_loss

RESPONSE = 256
"""Tokens per response."""


@dataclass
class Inputs:
    student: Tensor
    student_weight: Tensor
    teacher: Tensor
    teacher_weight: Tensor

    @property
    def mask(self) -> Tensor:
        return torch.ones(len(self.student) // RESPONSE, RESPONSE, dtype=torch.bool, device=self.student.device)

    @property
    def leaves(self) -> list[Tensor]:
        return [self.student, self.student_weight]


def make_inputs(o: argparse.Namespace, tokens: int) -> Inputs:
    generator = torch.Generator(o.device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=o.device).to(getattr(torch, o.dtype))

    student, teacher = o.widths
    return Inputs(  # logits of standard deviation 2
        normal(tokens, student).requires_grad_(),
        normal(o.vocab, student).mul_(2 * student**-0.5).requires_grad_(),
        normal(tokens, teacher),
        normal(o.vocab, teacher).mul_(2 * teacher**-0.5),
    )


def bare(x: Inputs) -> None:
    with torch.no_grad():
        teacher = x.teacher @ x.teacher_weight.T
    (x.student @ x.student_weight.T).backward(teacher)


def reference(x: Inputs) -> None:
    shape = (*x.mask.shape, -1)
    with torch.no_grad():
        teacher = (x.teacher @ x.teacher_weight.T).view(shape)
    tsdkd_loss((x.student @ x.student_weight.T).view(shape), teacher, x.mask, TSDKDConfig())[0].backward()


def released(x: Inputs, alpha: float = 0.1, beta: float = 0.9, k: int = 10, ratio: float = 0.1) -> None:
    shape = (*x.mask.shape, -1)
    with torch.no_grad():
        teacher = (x.teacher @ x.teacher_weight.T).view(shape).float()
    student = (x.student @ x.student_weight.T).view(shape).float()

    def entropy(logits: Tensor) -> Tensor:
        return -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)

    student_entropy, teacher_entropy = entropy(student), entropy(teacher)
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    log_beta = torch.log(torch.tensor([beta, 1 - beta], device=log_q.device))
    log_m = torch.logsumexp(torch.stack([log_p + log_beta[0], log_q + log_beta[1]]), 0)
    jsd = beta * (log_p.exp() * (log_p - log_m)).sum(-1) + (1 - beta) * (log_q.exp() * (log_q - log_m)).sum(-1)
    direct = (torch.sigmoid(student_entropy - teacher_entropy).detach() * jsd).mean()

    flat = student_entropy.detach().flatten()
    end = int((flat.cumsum(0) >= ratio * flat.sum()).nonzero()[0])
    opener = torch.arange(x.mask.shape[1], device=flat.device) <= end
    candidates = student.topk(k, -1).indices
    order = teacher.gather(-1, candidates).argsort(-1, descending=True)
    scores = student.gather(-1, candidates.gather(-1, order))
    nll = (scores.logcumsumexp(-1) - scores).sum(-1)
    indirect = nll[:, opener].mean()

    uncertain = student_entropy >= student_entropy.detach().quantile(ratio)
    (alpha * indirect + direct + student_entropy[uncertain].mean()).backward()


def tsdkd(x: Inputs, compiled: bool = False) -> None:
    teacher = TeacherHidden(x.teacher, Head(x.teacher_weight))
    head = Head(x.student_weight)
    loss, _ = token_selective_loss_from_hidden(x.student, head, teacher, x.mask, TSDKDConfig(), compiled=compiled)
    loss.backward()


def tsdkd_compiled(x: Inputs) -> None:
    tsdkd(x, compiled=True)


def trl(x: Inputs) -> None:
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    rows = (x.student.unsqueeze(0), x.teacher.unsqueeze(0), x.student_weight, x.teacher_weight)
    _chunked_divergence_loss(*rows, x.mask.view(1, -1), beta=0.9)[0].backward()


def liger(x: Inputs) -> None:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.9)
    targets = torch.zeros(len(x.student), dtype=torch.long, device=x.student.device)
    loss(x.student, x.student_weight, x.teacher, x.teacher_weight, targets).backward()


def liger_kernel(x: Inputs) -> None:
    from liger_kernel.transformers import LigerFusedLinearJSD

    loss = LigerFusedLinearJSD(jsd_beta=0.9)
    loss(x.student, x.student_weight, x.teacher, x.teacher_weight, None).backward()


ROWS: dict[str, Callable[[Inputs], None]] = {
    "bare projections": bare,
    "reference": reference,
    "released formula": released,
    "tsdkd": tsdkd,
    "tsdkd, compiled": tsdkd_compiled,
    "TRL, divergence alone": trl,
    "Liger, divergence alone": liger,
    "Liger's Triton kernel, divergence alone": liger_kernel,
}
