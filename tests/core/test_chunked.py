"""The chunked objective is the reference: same value, metrics and gradients, whatever the chunks, heads and settings."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tsdkd.core import (
    AdaptiveOpener,
    Head,
    TeacherHidden,
    TeacherRanks,
    TeacherTopK,
    TSDKDConfig,
    entropy,
    token_selective_loss,
    token_selective_loss_from_hidden,
    tsdkd_loss,
    tsdkd_loss_from_hidden,
)
from tsdkd.core import chunked as module
from tsdkd.errors import InputError

VOCAB, WIDTH, TEACHER_WIDTH = 19, 5, 7


@dataclasses.dataclass
class Case:
    student: torch.Tensor
    head: Head
    teacher: torch.Tensor
    teacher_head: Head
    mask: torch.Tensor

    def leaves(self) -> list[torch.Tensor]:
        return [t for t in (self.student, self.head.weight, self.head.bias) if t is not None]

    def fresh(self) -> "Case":
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
    ).fresh()


def reference(case: Case, config: TSDKDConfig, fraction: object = None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return tsdkd_loss(
        case.head.logits(case.student), case.teacher_head.logits(case.teacher), case.mask, config, fraction
    )


def by_chunks(
    case: Case, config: TSDKDConfig, chunk: int | None = None, fraction: object = None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    teacher = TeacherHidden(case.teacher[case.mask], case.teacher_head)
    return token_selective_loss_from_hidden(
        case.student[case.mask], case.head, teacher, case.mask, config, fraction, chunk
    )


def assert_equal(case: Case, config: TSDKDConfig, chunk: int | None = None, adaptive: bool = False) -> None:
    ours, theirs = case.fresh(), case.fresh()
    fractions = [AdaptiveOpener().fraction if adaptive else None for _ in range(2)]
    loss, metrics = by_chunks(ours, config, chunk, fractions[0])
    expected, expected_metrics = reference(theirs, config, fractions[1])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9, abs=1e-12)
    assert metrics.keys() == expected_metrics.keys()
    for name, value in metrics.items():
        assert value.item() == pytest.approx(expected_metrics[name].item(), rel=1e-9, abs=1e-12), name
    loss.backward()
    expected.backward()
    for mine, other in zip(ours.leaves(), theirs.leaves(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-9, atol=1e-12)


@given(
    lengths=st.lists(st.integers(1, 15), min_size=1, max_size=4),
    seed=st.integers(0, 10**6),
    chunk=st.sampled_from([1, 7, None]),
    block=st.sampled_from([1, 60, 2**19]),
    beta=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    reduction=st.sampled_from(["mean", "sum"]),
    gate=st.booleans(),
    opener=st.sampled_from([0.1, 1.0, "adaptive"]),
    temperature=st.sampled_from([1.0, 2.0]),
    off=st.sampled_from([None, "alpha", "direct_weight", "em_weight"]),
    head=st.sampled_from(
        [{}, {"bias": True}, {"softcap": 3.0}, {"logit_scale": 0.5, "softcap": 2.0}, {"logit_scale": 4.0, "bias": True}]
    ),
    padding_rows=st.sampled_from([0, 3]),
)
def test_chunks_give_the_reference(
    lengths: list[int],
    seed: int,
    chunk: int | None,
    block: int,
    beta: float,
    reduction: str,
    gate: bool,
    opener: float | str,
    temperature: float,
    off: str | None,
    head: dict[str, object],
    padding_rows: int,
) -> None:
    config = TSDKDConfig(
        k=4, beta=beta, indirect_reduction=reduction, gate=gate, opener=opener, temperature=temperature, em_ratio=0.3
    )
    config = dataclasses.replace(config, **({off: 0.0} if off else {"direct_weight": 3.0, "em_weight": 0.5}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(module.BLOCK_LOGITS, "cpu", block)
        assert_equal(make(lengths, seed, padding_rows=padding_rows, **head), config, chunk, opener == "adaptive")
