"""The chunked objective equals the reference: value, metrics and gradients, for all chunk sizes, heads and settings."""

import dataclasses
import shutil
from collections.abc import Set

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.largest_tensor import LargestTensor
from tests.helpers.objective_cases import MINILLM, TEACHER_WIDTH, VOCAB, WIDTH, Case, make, random_sampled
from tsdkd.core import (
    AdaptiveOpener,
    Head,
    SeveralTeachers,
    TeacherHidden,
    TeacherLogits,
    TeacherRanks,
    TeacherTokens,
    TeacherTopK,
    TSDKDConfig,
    chunk_sizes,
    chunked,
    entropy,
    lm_head,
    student_logits,
    token_selective_loss,
    token_selective_loss_from_hidden,
    tsdkd_loss,
    tsdkd_loss_from_hidden,
)
from tsdkd.core.config import TERMS
from tsdkd.core.lm_head import LinearOutputs
from tsdkd.errors import InputError


def reference(case: Case, config: TSDKDConfig, fraction: object = None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    student, teacher = case.head.logits(case.student), case.teacher_head.logits(case.teacher)
    if case.sampled is None:
        return tsdkd_loss(student, teacher, case.mask, config, fraction)
    parts = student[case.mask], TeacherLogits(teacher[case.mask]), case.mask
    return token_selective_loss(*parts, config, fraction, case.sampled)


def by_chunks(
    case: Case, config: TSDKDConfig, chunk: int | None = None, fraction: object = None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    teacher = TeacherHidden(case.teacher[case.mask], case.teacher_head)
    return token_selective_loss_from_hidden(
        case.student[case.mask], case.head, teacher, case.mask, config, fraction, chunk, sampled=case.sampled
    )


def with_grad_norms(names: Set[str]) -> set[str]:
    """The metrics of the chunked objective: those of the reference, and each term's norm."""
    return {*names, *(f"{term}_grad_norm" for term in TERMS if term in names)}


def assert_chunked_is_reference(
    case: Case, config: TSDKDConfig, chunk: int | None = None, adaptive: bool = False
) -> None:
    chunked_case, reference_case = case.clone(), case.clone()
    fractions = [AdaptiveOpener().fraction if adaptive else None for _ in range(2)]
    loss, metrics = by_chunks(chunked_case, config, chunk, fractions[0])
    expected, expected_metrics = reference(reference_case, config, fractions[1])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9, abs=1e-12)
    assert metrics.keys() == with_grad_norms(expected_metrics.keys())
    for name, value in expected_metrics.items():
        assert metrics[name].item() == pytest.approx(value.item(), rel=1e-9, abs=1e-12), name
    loss.backward()
    expected.backward()
    for actual, desired in zip(chunked_case.leaves(), reference_case.leaves(), strict=True):
        torch.testing.assert_close(actual.grad, desired.grad, rtol=1e-9, atol=1e-12)


@given(
    lengths=st.lists(st.integers(1, 15), min_size=1, max_size=4),
    seed=st.integers(0, 10**6),
    chunk=st.sampled_from([1, 7, None]),
    block=st.sampled_from([1, 60, 2**19]),
    divergence=st.sampled_from(
        [{"beta": beta} for beta in (0.0, 0.1, 0.5, 0.9, 1.0)]
        + [{"divergence": name, "skew": skew} for name in ("skew-kl", "skew-reverse-kl") for skew in (0.1, 0.6)]
    ),
    released=st.sets(st.sampled_from(["ranking", "opener", "entropy"])),
    reduction=st.sampled_from(["mean", "sum"]),
    gate=st.booleans(),
    opener=st.sampled_from([0.1, 1.0, "adaptive"]),
    temperature=st.sampled_from([1.0, 2.0]),
    off=st.sampled_from([None, "alpha", "direct_weight", "em_weight"]),
    head=st.sampled_from(
        [{}, {"bias": True}, {"softcap": 3.0}, {"logit_scale": 0.5, "softcap": 2.0}, {"logit_scale": 4.0, "bias": True}]
    ),
    padding_rows=st.sampled_from([0, 3]),
    row_step=st.sampled_from([1, 2, 8]),
)
def test_chunks_give_the_reference(
    lengths: list[int],
    seed: int,
    chunk: int | None,
    block: int,
    divergence: dict[str, object],
    released: set[str],
    reduction: str,
    gate: bool,
    opener: float | str,
    temperature: float,
    off: str | None,
    head: dict[str, object],
    padding_rows: int,
    row_step: int,
) -> None:
    config = TSDKDConfig(
        k=4, indirect_reduction=reduction, gate=gate, opener=opener, temperature=temperature, em_ratio=0.3, **divergence
    )
    released -= {"opener"} if opener == "adaptive" else set()
    config = dataclasses.replace(config, released=tuple(released))
    config = dataclasses.replace(config, **({off: 0.0} if off else {"direct_weight": 3.0, "em_weight": 0.5}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(chunk_sizes.BLOCK_LOGITS, "cpu", block)
        patch.setitem(lm_head.ROW_STEP, "cpu", row_step)
        assert_chunked_is_reference(
            make(lengths, seed, padding_rows=padding_rows, **head), config, chunk, opener == "adaptive"
        )


@given(
    lengths=st.lists(st.integers(1, 15), min_size=1, max_size=4),
    seed=st.integers(0, 10**6),
    chunk=st.sampled_from([1, 7, None]),
    block=st.sampled_from([1, 60, 2**19]),
    weight=st.sampled_from([0.5, 1.0]),
    teacher_fraction=st.sampled_from([0.0, 0.2, 1.0]),
    moved=st.booleans(),
    others=st.sampled_from([{"alpha": 0, "em_weight": 0}, {"alpha": 0.3, "em_weight": 0.5, "em_ratio": 0.3}]),
    head=st.sampled_from([{}, {"bias": True}, {"logit_scale": 0.5, "softcap": 2.0}]),
    padding_rows=st.sampled_from([0, 3]),
)
def test_chunks_give_the_references_policy_gradient(
    lengths: list[int],
    seed: int,
    chunk: int | None,
    block: int,
    weight: float,
    teacher_fraction: float,
    moved: bool,
    others: dict[str, float],
    head: dict[str, object],
    padding_rows: int,
) -> None:
    """`moved`: the student has changed since it sampled."""
    config = TSDKDConfig(k=4, beta=1.0, gate=False, direct_weight=2.0, policy_gradient_weight=weight, **others)
    case = make(lengths, seed, padding_rows=padding_rows, **head)
    case.sampled = random_sampled(case, seed, teacher_fraction, moved)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(chunk_sizes.BLOCK_LOGITS, "cpu", block)
        assert_chunked_is_reference(case, config, chunk)


def test_gradcheck_through_hidden_states_head_and_bias() -> None:
    case = make([5, 3], bias=True, softcap=3.0)
    config = TSDKDConfig(k=3, gate=False, opener=1.0)  # the gate and the choice of tokens carry no gradient

    class RecomputedLoss(torch.autograd.Function):
        """gradcheck differentiates one result many times; the chunked loss can be differentiated once."""

        @staticmethod
        def forward(ctx: object, student: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(student, weight, bias)
            return RecomputedLoss.loss(student, weight, bias)

        @staticmethod
        def backward(ctx: object, upstream: torch.Tensor) -> tuple[torch.Tensor, ...]:
            leaves = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
            with torch.enable_grad():
                return torch.autograd.grad(RecomputedLoss.loss(*leaves), leaves, upstream)

        @staticmethod
        def loss(student: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
            head = dataclasses.replace(case.head, weight=weight, bias=bias)
            return by_chunks(dataclasses.replace(case, student=student, head=head), config, chunk=3)[0]

    assert torch.autograd.gradcheck(RecomputedLoss.apply, tuple(case.leaves()))


@pytest.mark.parametrize("divergence", ["jsd", "skew-kl", "skew-reverse-kl"])
@pytest.mark.parametrize("kind", ["topk", "ranks", "tokens"])
@pytest.mark.parametrize("chunk", [1, 5, None])
def test_recorded_teachers_give_the_reference(kind: str, chunk: int | None, divergence: str) -> None:
    case = make([9, 4])
    s = case.head.logits(case.student)[case.mask].detach()
    t = s + torch.randn(s.shape, generator=torch.Generator().manual_seed(1), dtype=s.dtype)
    candidates = s.topk(6).indices
    recorded = TeacherRanks(entropy(t), candidates, t.gather(-1, candidates).argsort(-1, descending=True).argsort(-1))
    best = t.log_softmax(-1).topk(5)
    teacher = recorded if kind == "ranks" else TeacherTopK(recorded, best.indices, best.values)
    config = TSDKDConfig(k=4, direct_weight=0.0 if kind == "ranks" else 2.0, divergence=divergence, skew=0.3)
    if kind == "tokens":
        teacher, config = TeacherTokens(best.indices[:, 0]), TSDKDConfig(alpha=0, beta=0, gate=False)
    chunked_case, reference_case = case.clone(), case.clone()
    loss, metrics = token_selective_loss_from_hidden(
        chunked_case.student[chunked_case.mask], chunked_case.head, teacher, chunked_case.mask, config, chunk=chunk
    )
    expected, expected_metrics = token_selective_loss(
        reference_case.head.logits(reference_case.student)[reference_case.mask], teacher, reference_case.mask, config
    )
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    assert metrics.keys() == with_grad_norms(expected_metrics.keys())
    assert ("student_outside_mass" in metrics) == (kind != "tokens")
    assert "teacher_outside_mass" not in metrics
    assert ("top1_agreement" in metrics) == (kind == "topk")
    for name, value in expected_metrics.items():
        assert metrics[name].item() == pytest.approx(value.item(), rel=1e-6, abs=1e-9), name
    loss.backward()
    expected.backward()
    for actual, desired in zip(chunked_case.leaves(), reference_case.leaves(), strict=True):
        torch.testing.assert_close(actual.grad, desired.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("config", [TSDKDConfig(k=4, temperature=2.0), MINILLM], ids=["tsdkd", "minillm"])
@pytest.mark.parametrize("chunk", [1, 5, None])
def test_several_teachers_give_the_reference_of_their_logits(config: TSDKDConfig, chunk: int | None) -> None:
    """Two responses have a teacher each, of other widths; chunks hold tokens of both."""
    case = make([9, 4])
    case.sampled = random_sampled(case) if config is MINILLM else None
    narrow = Head(torch.randn(VOCAB, 3, dtype=torch.float64), logit_scale=0.5, softcap=3.0)
    own = [case.teacher[0, :9], torch.randn(4, 3, dtype=torch.float64)]
    teachers = [TeacherHidden(own[0], case.teacher_head), TeacherHidden(own[1], narrow)]
    logits = torch.cat([teacher.materialized().logits for teacher in teachers])
    signals = SeveralTeachers.of(teachers, torch.tensor([0] * 9 + [1] * 4)), TeacherLogits(logits)
    results = []
    for signal in signals:
        copy = case.clone()
        loss, metrics = token_selective_loss_from_hidden(
            copy.student[copy.mask], copy.head, signal, copy.mask, config, None, chunk, sampled=case.sampled
        )
        loss.backward()
        results.append([loss, *metrics.values(), *(leaf.grad for leaf in copy.leaves())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("config", [TSDKDConfig(k=4, temperature=2.0, alpha=0.3), MINILLM], ids=["tsdkd", "minillm"])
@pytest.mark.parametrize("head", [{}, {"bias": True, "logit_scale": 0.5, "softcap": 2.0}])
@pytest.mark.parametrize("chunk", [5, None])
def test_grad_norms_are_those_of_autograd(config: TSDKDConfig, head: dict[str, object], chunk: int | None) -> None:
    """The loss is linear in a term's weight: doubling it adds the weighted term's gradient at the hidden states."""
    case = make([9, 4, 1], **head)
    case.sampled = random_sampled(case) if config is MINILLM else None
    _, metrics = by_chunks(case, config, chunk)
    terms = [term for term in TERMS if term in metrics]
    assert terms == (["direct", "policy_gradient"] if config is MINILLM else ["indirect", "direct", "entropy"])
    for term in terms:
        doubled = dataclasses.replace(config, **{TERMS[term]: 2 * getattr(config, TERMS[term])})
        one, two = (torch.autograd.grad(reference(case, c)[0], case.student)[0] for c in (config, doubled))
        assert metrics[f"{term}_grad_norm"].item() == pytest.approx((two - one).norm().item(), rel=1e-9), term


def test_hidden_states_without_a_gradient_have_no_grad_norms() -> None:
    case = make([9, 4])
    case.student.requires_grad_(False)
    assert by_chunks(case, TSDKDConfig(k=4))[1].keys() == reference(case, TSDKDConfig(k=4))[1].keys()


@pytest.mark.parametrize("head", [{}, {"logit_scale": 0.5, "softcap": 30.0}])
def test_a_bfloat16_teacher_has_the_outside_mass_of_its_rounded_logits(head: dict[str, object]) -> None:
    """At 16 to 32, bfloat16 logits are multiples of 1/8: candidates that are not rounded alike miss up to 6 %."""
    case = make([40, 25], dtype=torch.float32)
    weight = 20 * case.teacher_head.weight.bfloat16()
    case.teacher_head = dataclasses.replace(case.teacher_head, weight=weight, **head)
    case.teacher = case.teacher.bfloat16()
    config = TSDKDConfig(k=4, opener=1.0)
    masses = [function(case, config)[1]["teacher_outside_mass"].item() for function in (by_chunks, reference)]
    assert masses[0] == pytest.approx(masses[1], rel=1e-4)


@settings(derandomize=True)  # no draw decides: the worst of 400 random cases was 1.6
@given(
    lengths=st.lists(st.integers(10, 40), min_size=1, max_size=3),
    seed=st.integers(0, 10**6),
    chunk=st.sampled_from([1, 7, None]),
    beta=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    autocast=st.booleans(),
)
def test_bfloat16_rounds_as_the_reference(
    lengths: list[int], seed: int, chunk: int | None, beta: float, autocast: bool
) -> None:
    """Without selections that rounding can change: all tokens are uncertain, no token is ranked."""
    config = TSDKDConfig(alpha=0, direct_weight=3.0, beta=beta, em_ratio=1.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(student_logits, "MAX_PRODUCT_ELEMENTS", 4 * WIDTH)
        assert_error_near_reference(lengths, seed, chunk, config, autocast)


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_rounds_as_the_reference_with_the_indirect_term(autocast: bool) -> None:
    assert_error_near_reference([40, 25], 3, None, TSDKDConfig(k=4, direct_weight=3.0), autocast)


def assert_error_near_reference(
    lengths: list[int], seed: int, chunk: int | None, config: TSDKDConfig, autocast: bool
) -> None:
    """The rounding error of each gradient is at most twice that of the reference."""
    exact = make(lengths, seed, dtype=torch.float64)
    truth, _ = reference(exact, config)
    truth.backward()
    errors = []
    for function in (lambda *given: by_chunks(*given, chunk), reference):
        rounded = make(lengths, seed, dtype=torch.float32 if autocast else torch.bfloat16)
        rounded.teacher_head = dataclasses.replace(
            rounded.teacher_head, weight=exact.teacher_head.weight.detach().bfloat16()
        )
        rounded.teacher = exact.teacher.bfloat16()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss, _ = function(rounded, config)
        loss.backward()
        assert loss.item() == pytest.approx(truth.item(), rel=0.02)
        errors.append(
            [
                float((actual.grad.double() - true.grad).norm() / true.grad.norm())
                for actual, true in zip(rounded.leaves(), exact.leaves(), strict=True)
            ]
        )
        assert all(actual.grad.dtype == actual.dtype for actual in rounded.leaves())
    for chunked_error, reference_error in zip(*errors, strict=True):
        assert chunked_error < 2 * reference_error


def test_a_frozen_head_gets_no_gradient_and_costs_none(monkeypatch: pytest.MonkeyPatch) -> None:
    created: list[chunked.StudentLogits] = []
    init = chunked.StudentLogits.__init__
    monkeypatch.setattr(
        chunked.StudentLogits, "__init__", lambda self, *args: created.append(self) or init(self, *args)
    )
    case = make([9, 4])
    case.head.weight.requires_grad_(False)
    loss, _ = by_chunks(case, TSDKDConfig(k=4))
    loss.backward()
    assert case.head.weight.grad is None
    assert [total is None for total in created[0]._sums] == [False, True, True]
    with torch.no_grad():
        measured, _ = by_chunks(make([9, 4]), TSDKDConfig(k=4))
    assert measured.item() == pytest.approx(loss.item())
    assert not created[1].requires_grad
    free = make([9, 4])
    by_chunks(free, TSDKDConfig(k=4))[0].backward()
    assert torch.equal(case.student.grad, free.student.grad)


def test_a_head_computed_from_other_tensors_passes_its_gradient_on() -> None:
    """LoRA on the head, and a tied embedding."""
    case = make([9, 4])
    down, up = torch.randn(2, WIDTH, dtype=torch.float64), torch.randn(VOCAB, 2, dtype=torch.float64)
    ids = torch.randint(VOCAB, case.student.shape[:2])
    results = []
    for function in (by_chunks, reference):
        base, a, b = (t.detach().clone().requires_grad_() for t in (case.head.weight, down, up))
        head = dataclasses.replace(case.head, weight=base + 0.5 * b @ a)
        tied = dataclasses.replace(case, student=torch.tanh(base[ids]), head=head)
        function(tied, TSDKDConfig(k=4))[0].backward()
        results.append([base.grad, a.grad, b.grad])
    for actual, desired in zip(*results, strict=True):
        torch.testing.assert_close(actual, desired, rtol=1e-9, atol=1e-12)


def test_the_upstream_gradient_scales_the_gradients() -> None:
    one, five = make([6]), make([6])
    by_chunks(one, TSDKDConfig(k=4))[0].backward()
    (5 * by_chunks(five, TSDKDConfig(k=4))[0]).backward()
    torch.testing.assert_close(five.head.weight.grad, 5 * one.head.weight.grad)


def test_a_second_backward_is_refused() -> None:
    loss, _ = by_chunks(make([6]), TSDKDConfig(k=4))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        loss.backward()


@pytest.mark.parametrize("scale", [1e4, -1e4])
@pytest.mark.parametrize(
    "divergence",
    [{"beta": 0.0}, {"beta": 0.9}, {"beta": 1.0}, {"divergence": "skew-kl"}, {"divergence": "skew-reverse-kl"}],
)
def test_huge_logits_give_the_reference(scale: float, divergence: dict[str, object]) -> None:
    config = TSDKDConfig(k=4, **divergence)
    narrow, exact = make([6, 1], dtype=torch.float32), make([6, 1])
    for case in (narrow, exact):
        case.head.weight.data = exact.head.weight.data.to(case.head.weight.dtype)
        case.student = (exact.student.detach().sign() * scale).to(case.student.dtype).requires_grad_()
    loss, _ = by_chunks(narrow, config)
    expected, _ = reference(exact, config)
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    for actual, desired in zip(narrow.leaves(), exact.leaves(), strict=True):
        assert (actual.grad.double() - desired.grad).norm() < 1e-2 * desired.grad.norm()  # float32 resolves 1e4 to 1e-3


@pytest.mark.parametrize("term", ["alpha", "direct_weight", "em_weight"])
def test_a_softcap_is_formed_in_float32_behind_bfloat16_products(term: str) -> None:
    """The reference on the same bfloat16 products, in float64 from there on."""
    config = TSDKDConfig(
        **{"k": 4, "opener": 1.0, "em_ratio": 1.0} | ({"alpha": 0, "direct_weight": 0, "em_weight": 0} | {term: 1.0})
    )
    case = make([30], dtype=torch.bfloat16, softcap=3.0)
    loss, _ = by_chunks(case, config)
    with torch.no_grad():
        linear = (case.student @ case.head.weight[:VOCAB].T).double()
        teacher = case.teacher_head.logits(case.teacher).double()
    expected, _ = tsdkd_loss(3 * torch.tanh(linear / 3), teacher, case.mask, config)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5 if term != "alpha" else 0.02)


def test_the_public_form_masks_and_checks() -> None:
    config = TSDKDConfig(k=4)
    case = make([9, 4])
    content = torch.where(case.mask.unsqueeze(-1), case.student.detach(), torch.nan)  # padding holds NaN
    parts = (case.head, case.teacher, case.teacher_head)
    loss, _ = tsdkd_loss_from_hidden(content, *parts, case.mask, config)
    assert loss.item() == pytest.approx(reference(case, config)[0].item(), rel=1e-9)
    with pytest.raises(InputError, match="Align all three"):
        tsdkd_loss_from_hidden(content[:, 1:], *parts, case.mask, config)
    cut = dataclasses.replace(case.teacher_head, vocab_size=VOCAB - 1)
    with pytest.raises(InputError, match="head has 19 tokens, the teacher's 18"):
        tsdkd_loss_from_hidden(content, case.head, case.teacher, cut, case.mask, config)
    with pytest.raises(InputError, match="only 19 tokens"):
        tsdkd_loss_from_hidden(content, *parts, case.mask, TSDKDConfig(k=19))
    with pytest.raises(InputError, match="Row 1 has no response token"):
        tsdkd_loss_from_hidden(content, *parts, case.mask & torch.tensor([[True], [False]]), config)
    with pytest.raises(InputError, match="float16"):
        tsdkd_loss_from_hidden(content.half(), *parts, case.mask, config)
    rows, teacher = case.student[case.mask], TeacherHidden(case.teacher[case.mask], case.teacher_head)
    with pytest.raises(InputError, match="mask has 13 response tokens, the student 13, the teacher 12"):
        token_selective_loss_from_hidden(rows, case.head, teacher.take(slice(12)), case.mask, config)
    recorded = TeacherTokens(torch.zeros(13, dtype=torch.long))
    with pytest.raises(InputError, match="needs the teacher's probability of every token"):
        token_selective_loss_from_hidden(rows, case.head, recorded, case.mask, config, compiled=True)


@pytest.mark.parametrize("config", [TSDKDConfig(k=4), TSDKDConfig(k=18, opener=1.0, em_ratio=1.0), MINILLM])
def test_no_tensor_grows_to_tokens_times_vocabulary(config: TSDKDConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measures the result of every operation, forward and backward."""
    monkeypatch.setitem(chunk_sizes.BLOCK_LOGITS, "cpu", 4 * VOCAB)
    monkeypatch.setitem(chunk_sizes.CHUNK_BYTES, "cpu", 100 * VOCAB * 8)  # float64
    monkeypatch.setattr(chunk_sizes, "TOKEN_STEP", 1)
    case = make([200, 120])
    case.sampled = random_sampled(case)

    with LargestTensor() as largest:
        by_chunks(case, config)[0].backward()
    assert 80 * VOCAB <= largest.elements < 320 * VOCAB
    assert largest.elements <= max(case.teacher.numel(), 320 * config.k)  # hidden states, and k scores a token


@pytest.mark.parametrize("tokens", [100, 256, 320, 513, 8192])
def test_chunks_have_a_bounded_size(tokens: int) -> None:
    """At Qwen2.5's vocabulary the student's logits of a chunk and the teacher's of a part stay below 0.25 GB."""
    chunk = chunk_sizes.chunk_tokens(torch.zeros(tokens, 1), 151936)
    assert chunk % chunk_sizes.TOKEN_STEP == 0
    assert chunk < tokens + chunk_sizes.TOKEN_STEP
    assert chunk * (1 + 1 / chunk_sizes.TEACHER_CHUNKS) * 151936 * 4 < 0.25e9


@pytest.mark.parametrize("rows", [21, 30, 40])
def test_products_take_as_many_rows_as_the_device_likes(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding rows that are too few become zeros, and those that are too many are left out."""
    monkeypatch.setitem(lm_head.ROW_STEP, "cpu", 8)
    head, hidden = Head(torch.randn(rows, 4), torch.randn(rows), vocab_size=21), torch.randn(3, 4)
    aligned = head.aligned
    assert aligned.bias is not None
    assert (len(aligned.weight), len(aligned.bias), aligned.vocab) == (24, 24, 21)
    assert head.linear(hidden).values.shape == (3, 24)
    torch.testing.assert_close(head.logits(hidden), hidden @ head.weight[:21].T + head.bias[:21])


def test_the_teachers_logits_of_a_chunk_are_formed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    case, linear, formed = make([40, 24]), Head.linear, {WIDTH: 0, TEACHER_WIDTH: 0}

    def spy(head: Head, hidden: torch.Tensor, out: torch.Tensor | None) -> LinearOutputs:
        formed[hidden.shape[1]] = max(formed[hidden.shape[1]], len(hidden))
        return linear(head, hidden, out)

    monkeypatch.setattr(Head, "linear", spy)
    by_chunks(case, TSDKDConfig(k=4), chunk=32)
    assert formed == {WIDTH: 32, TEACHER_WIDTH: 32 / chunk_sizes.TEACHER_CHUNKS}


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("softcap", [3.0, None])
@pytest.mark.parametrize("config", [TSDKDConfig(k=4), MINILLM])
def test_the_compiled_path_is_the_plain_one(
    monkeypatch: pytest.MonkeyPatch, config: TSDKDConfig, softcap: float | None
) -> None:
    """Over blocks of six, six and one tokens. Without a soft-cap, logits and gradients share memory."""
    monkeypatch.setitem(chunk_sizes.BLOCK_LOGITS, "cpu", 6 * VOCAB)
    results = []
    for compiled in (False, True):
        case = make([9, 4], dtype=torch.float32, softcap=softcap)
        teacher = TeacherHidden(case.teacher[case.mask], case.teacher_head)
        loss, metrics = token_selective_loss_from_hidden(
            case.student[case.mask],
            case.head,
            teacher,
            case.mask,
            config,
            compiled=compiled,
            sampled=random_sampled(case),
        )
        loss.backward()
        results.append([*metrics.values(), loss.detach(), case.student.grad, case.head.weight.grad])
    for actual, desired in zip(*results, strict=True):
        torch.testing.assert_close(actual, desired)
