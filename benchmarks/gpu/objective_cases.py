"""The objective and its kernel beside the reference in float64 on the CPU."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.figures import Figure, Options, within
from tsdkd.core import Head, TeacherHidden, TSDKDConfig, token_selective_loss, token_selective_loss_from_hidden
from tsdkd.core.gradients import BlockBuffers
from tsdkd.core.lm_head import LinearOutputs
from tsdkd.core.token_comparison import Comparison, compare_by_kernel, compare_logits

BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 0.02}
FORMULAS = {
    "JSD": TSDKDConfig(k=4),
    "forward KL": TSDKDConfig(k=4, beta=0.0, temperature=2.0),
    "reverse KL": TSDKDConfig(k=4, beta=1.0),
    "skew KL": TSDKDConfig(k=4, divergence="skew-kl", skew=0.3),
}
VOCAB = 999
SEED = 1
"""Of inputs without near ties: in bfloat16, rounding would swap tied candidates and uncertain tokens."""


@dataclass(frozen=True)
class ObjectiveCase:
    """One comparison of a part of the objective with the reference in float64."""

    part: str
    formula: str
    dtype: torch.dtype
    softcap: float | None

    @property
    def name(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return f"{self.part}: {self.formula}, {kind}{', soft-cap' if self.softcap else ''}"

    def measure(self, device: str) -> Figure:
        """The largest difference, relative to the largest value of its tensor."""
        exact = self.run("reference" if self.part in OBJECTIVES else "comparison", torch.float64, "cpu")
        pairs = zip(exact, self.run(self.part, self.dtype, device), strict=True)
        worst = max(float((a - b.cpu().double()).abs().max() / a.abs().max()) for a, b in pairs)
        return within(worst, BOUNDS[self.dtype])

    def run(self, part: str, dtype: torch.dtype, device: str) -> list[Tensor]:
        """Loss and gradients of the objective, or the values of each token and their gradient."""
        generator, config = torch.Generator().manual_seed(SEED), FORMULAS[self.formula]
        mask = torch.ones(3, 40, dtype=torch.bool)
        mask[1, 30:] = mask[2, 7:] = False
        tokens = int(mask.sum())

        def normal(rows: int, columns: int, scale: float) -> Tensor:
            values = torch.randn(rows, columns, generator=generator) * scale
            return values.to(self.dtype).to(dtype).to(device)

        if part in COMPARISONS:
            outputs = (LinearOutputs(normal(tokens, VOCAB, 2.0), softcap=self.softcap) for _ in range(2))
            return COMPARISONS[part](*outputs, config)
        student, teacher = normal(tokens, 48, 1.0), normal(tokens, 64, 1.0)
        heads = Head(normal(VOCAB, 48, 0.3), softcap=self.softcap), Head(normal(VOCAB, 64, 0.25), softcap=self.softcap)
        leaves = [student.requires_grad_(), heads[0].weight.requires_grad_()]
        loss = OBJECTIVES[part](student, heads[0], TeacherHidden(teacher, heads[1]), mask.to(device), config)
        loss.backward()
        return [loss.detach(), *(leaf.grad for leaf in leaves)]


def _reference(student: Tensor, head: Head, teacher: TeacherHidden, mask: Tensor, config: TSDKDConfig) -> Tensor:
    return token_selective_loss(head.logits(student), teacher, mask, config)[0]


def _chunked(*arguments: Any, compiled: bool = False) -> Tensor:
    return token_selective_loss_from_hidden(*arguments, compiled=compiled)[0]


def _comparison(student: LinearOutputs, teacher: LinearOutputs, config: TSDKDConfig) -> list[Tensor]:
    logits, grads = student.logits(), torch.empty_like(student.values)
    others = Comparison(config.formula, config.temperature), None, BlockBuffers(), grads
    values = compare_logits(logits, teacher.logits(), student.softcap_grad(logits), *others)
    return [*values[:4], grads]


def _kernel(student: LinearOutputs, teacher: LinearOutputs, config: TSDKDConfig) -> list[Tensor]:
    values = compare_by_kernel(student, teacher, Comparison(config.formula, config.temperature), None)
    return [*values[:4], student.values]


OBJECTIVES: dict[str, Callable[..., Tensor]] = {
    "chunked": _chunked,
    "chunked, compiled": partial(_chunked, compiled=True),
    "reference": _reference,
}
COMPARISONS: dict[str, Callable[..., list[Tensor]]] = {"comparison": _comparison, "kernel": _kernel}


def cases(options: Options) -> list[ObjectiveCase]:
    """With --tiny one divergence, compiled once; without a GPU not the kernel."""
    parts = [*OBJECTIVES, *COMPARISONS]
    if options.device != "cuda":
        parts.remove("kernel")
    made = [ObjectiveCase(*values) for values in product(parts, FORMULAS, BOUNDS, (None, 3.0))]
    if options.tiny:
        return [case for case in made if case.formula == "JSD" and not ("compiled" in case.part and case.softcap)][::2]
    return made
