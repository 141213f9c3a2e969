"""Random hidden states and heads of both models, the objective's input without logits."""

import dataclasses

import torch

from tsdkd.core import Head, SampledTokens, TSDKDConfig

VOCAB, WIDTH, TEACHER_WIDTH = 19, 5, 7
MINILLM = TSDKDConfig(alpha=0, beta=1.0, gate=False, em_weight=0, policy_gradient_weight=1.0)


@dataclasses.dataclass
class Case:
    student: torch.Tensor
    head: Head
    teacher: torch.Tensor
    teacher_head: Head
    mask: torch.Tensor
    sampled: SampledTokens | None = None
    """Set for the policy gradient."""

    def leaves(self) -> list[torch.Tensor]:
        return [t for t in (self.student, self.head.weight, self.head.bias) if t is not None]

    def clone(self) -> "Case":
        weight, bias = self.head.weight.detach().clone(), self.head.bias
        bias = None if bias is None else bias.detach().clone().requires_grad_()
        head = dataclasses.replace(self.head, weight=weight.requires_grad_(), bias=bias)
        return dataclasses.replace(self, student=self.student.detach().clone().requires_grad_(), head=head)


def make(
    lengths: list[int], seed: int = 0, dtype: torch.dtype = torch.float64, padding_rows: int = 0, **head: object
) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    longest = max(lengths)
    mask = torch.arange(longest).unsqueeze(0) < torch.tensor(lengths).unsqueeze(1)
    bias = normal(VOCAB + padding_rows) if head.pop("bias", False) else None
    return Case(
        student=normal(len(lengths), longest, WIDTH),
        head=Head(normal(VOCAB + padding_rows, WIDTH), bias, vocab_size=VOCAB, **head),
        teacher=normal(len(lengths), longest, TEACHER_WIDTH),
        teacher_head=Head(normal(VOCAB + 2, TEACHER_WIDTH), vocab_size=VOCAB),
        mask=mask,
    ).clone()


def random_sampled(case: Case, seed: int = 0, teacher_fraction: float = 0.2, moved: bool = True) -> SampledTokens:
    """Random tokens, and with `moved` random log-probabilities at sampling."""
    generator, tokens = torch.Generator().manual_seed(seed), int(case.mask.sum())
    ids = torch.randint(VOCAB, (tokens,), generator=generator)
    then = -torch.rand(tokens, generator=generator, dtype=case.student.dtype) * 4
    return SampledTokens(ids, teacher_fraction, then if moved else None)
