"""The reference objective: held to a plain transcription of the equations, and independent of padding and batching."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.batches import VOCAB, Batch, make, value_and_gradient
from tsdkd.core import (
    Divergence,
    TeacherLogits,
    TeacherRanks,
    TeacherTopK,
    TSDKDConfig,
    entropy,
    generalized_jsd,
    opener_mask,
    token_selective_loss,
    top_entropy_mask,
    tsdkd_loss,
)
from tsdkd.errors import InputError


def transcription(student: torch.Tensor, teacher: torch.Tensor, config: TSDKDConfig) -> float:
    """The loss of one response (L, vocab): the equations written out with Python numbers."""
    length = len(student)
    q, p = student.softmax(-1).tolist(), teacher.softmax(-1).tolist()
    h_s = [-sum(x * math.log(x) for x in row) for row in q]
    h_t = [-sum(x * math.log(x) for x in row) for row in p]
    m, cumulated = 0, 0.0
    while cumulated < config.opener * sum(h_s) - 1e-12:
        cumulated += h_s[m]
        m += 1
    indirect = 0.0
    for t in range(m):
        candidates = sorted(range(VOCAB), key=lambda v: -student[t][v])[: config.k]
        ranking = sorted(candidates, key=lambda v: -teacher[t][v])
        for j in range(config.k):
            indirect -= math.log(math.exp(student[t][ranking[j]]) / sum(math.exp(student[t][v]) for v in ranking[j:]))
    direct = 0.0
    for t in range(length):
        mixture = [config.beta * a + (1 - config.beta) * b for a, b in zip(p[t], q[t], strict=True)]
        jsd = sum(config.beta * a * math.log(a / c) for a, c in zip(p[t], mixture, strict=True))
        jsd += sum((1 - config.beta) * b * math.log(b / c) for b, c in zip(q[t], mixture, strict=True))
        direct += jsd / (1 + math.exp(-(h_s[t] - h_t[t]) / config.tau))
    chosen = sorted(h_s, reverse=True)[: max(1, math.ceil(round(config.em_ratio * length, 9)))]
    return config.alpha * indirect / m + direct / length + sum(chosen) / len(chosen)


@pytest.mark.parametrize("length", [1, 2, 7, 30])
def test_the_loss_is_the_equations(length: int) -> None:
    config = TSDKDConfig(k=4, tau=0.7)
    student, teacher, mask = make([length])
    loss, _ = tsdkd_loss(student, teacher, mask, config)
    assert loss.item() == pytest.approx(transcription(student[0], teacher[0], config))


def test_a_batch_is_the_mean_of_its_responses() -> None:
    config = TSDKDConfig(k=4)
    student, teacher, mask = make([12, 1, 5])
    alone = [transcription(student[i, :n], teacher[i, :n], config) for i, n in enumerate([12, 1, 5])]
    loss, metrics = tsdkd_loss(student, teacher, mask, config)
    assert loss.item() == pytest.approx(sum(alone) / 3)
    assert metrics["response_length"].item() == pytest.approx(6)


def test_terms_add_up_with_their_weights() -> None:
    config = TSDKDConfig(k=4, alpha=0.3, direct_weight=2.0, em_weight=0.5)
    loss, metrics = tsdkd_loss(*make([9, 4]), config)
    expected = 0.3 * metrics["indirect"] + 2.0 * metrics["direct"] + 0.5 * metrics["entropy"]
    assert loss.item() == pytest.approx(expected.item())


def test_the_outside_mass_is_one_minus_the_mass_of_the_candidates() -> None:
    """A response of one token, whose candidates are the student's tokens of probability 0.5 and 0.2."""
    student, teacher = torch.tensor([[0.5, 0.2, 0.19, 0.11], [0.1, 0.3, 0.4, 0.2]]).double().log().view(2, 1, 1, 4)
    mask = torch.ones(1, 1, dtype=torch.bool)
    _, metrics = tsdkd_loss(student, teacher, mask, TSDKDConfig(k=2))
    assert metrics["student_outside_mass"].item() == pytest.approx(0.3)
    assert metrics["teacher_outside_mass"].item() == pytest.approx(0.6)
    _, tempered = tsdkd_loss(student, teacher, mask, TSDKDConfig(k=2, temperature=0.5))
    squares = 0.19**2 + 0.11**2
    assert tempered["student_outside_mass"].item() == pytest.approx(squares / (0.5**2 + 0.2**2 + squares))


def test_the_indirect_term_does_not_depend_on_the_outside_mass() -> None:
    """All candidates' logits fall by half their distance to the next token: mass moves outside, the term stays."""
    student, teacher, mask = make([9, 4])
    best = student.topk(5)
    shift = (best.values[..., 4:] - best.values[..., 3:4]) / 2
    moved = student.scatter_add(-1, best.indices[..., :4], shift.expand(-1, -1, 4))
    config = TSDKDConfig(k=4, opener=1.0)
    (_, before), (_, after) = (tsdkd_loss(logits, teacher, mask, config) for logits in (student, moved))
    assert after["indirect"].item() == pytest.approx(before["indirect"].item())
    assert after["student_outside_mass"] > 1.05 * before["student_outside_mass"]
    assert after["teacher_outside_mass"] == before["teacher_outside_mass"]


def test_teacher_equal_to_student_leaves_no_direct_loss() -> None:
    student, _, mask = make([9, 4])
    _, metrics = tsdkd_loss(student, student, mask, TSDKDConfig(k=4))
    assert metrics["direct"].item() == pytest.approx(0, abs=1e-12)
    assert metrics["rank_agreement"].item() == pytest.approx(1)
    assert metrics["top1_agreement"].item() == pytest.approx(1)


def test_gradcheck_of_each_term() -> None:
    student, teacher, mask = make([5, 3], vocab=8)
    student.requires_grad_()
    for switched_on in ({"alpha": 0.1}, {"direct_weight": 1.0}, {"em_weight": 1.0}):
        off = {"alpha": 0.0, "direct_weight": 0.0, "em_weight": 0.0}
        config = TSDKDConfig(k=3, gate=False, **(off | switched_on))
        assert torch.autograd.gradcheck(lambda s, c=config: tsdkd_loss(s, teacher, mask, c)[0], student)


def test_gradients_stay_inside_the_selection() -> None:
    student, teacher, mask = make([20, 11])
    hs = entropy(student)
    off = {"alpha": 0.0, "direct_weight": 0.0, "em_weight": 0.0}
    cases = {
        "alpha": opener_mask(hs, mask, 0.1),
        "direct_weight": mask,
        "em_weight": top_entropy_mask(hs, mask, 0.1),
    }
    for term, selected in cases.items():
        _, gradient = value_and_gradient((student, teacher, mask), TSDKDConfig(k=4, **(off | {term: 1.0})))
        assert torch.equal(gradient.abs().sum(-1) > 0, selected), term


def test_the_gate_weights_the_direct_gradient_and_receives_none() -> None:
    """The direct gradient is the gate's value times the divergence's gradient; no gradient flows through the gate."""
    student, teacher, mask = make([6])
    config = TSDKDConfig(alpha=0, em_weight=0, k=4)
    _, found = value_and_gradient((student, teacher, mask), config)
    gate = torch.sigmoid(entropy(student) - entropy(teacher))
    leaf = student.clone().requires_grad_()
    (gate * generalized_jsd(leaf, teacher, 0.9)).mean().backward()
    assert torch.allclose(found, leaf.grad)


def shifted(batch: Batch, left: int, right: int, content: float) -> Batch:
    student, teacher, mask = batch
    pad = torch.nn.functional.pad
    return (
        pad(student, (0, 0, left, right), value=content),
        pad(teacher, (0, 0, left, right), value=-content),
        pad(mask, (left, right)),
    )


@pytest.mark.parametrize(("left", "right"), [(3, 0), (0, 3), (2, 5)])
@pytest.mark.parametrize("content", [0.0, 1e4, float("nan"), float("inf")])
def test_padding_changes_nothing(left: int, right: int, content: float) -> None:
    batch = make([9, 4, 1])
    config = TSDKDConfig(k=4)
    loss, gradient = value_and_gradient(batch, config)
    padded_loss, padded_gradient = value_and_gradient(shifted(batch, left, right, content), config)
    assert torch.equal(padded_loss, loss)
    assert torch.equal(padded_gradient[:, left : left + 9], gradient)
    assert not padded_gradient[:, :left].any()
    assert not padded_gradient[:, left + 9 :].any()


@settings(max_examples=30)
@given(st.lists(st.integers(1, 12), min_size=2, max_size=6), st.data())
def test_micro_batches_and_order_change_nothing(lengths: list[int], data: st.DataObject) -> None:
    """Micro-batches, weighted by their number of responses, add up to the batch, in any order."""
    order = data.draw(st.permutations(range(len(lengths))))
    cut = data.draw(st.integers(1, len(lengths) - 1))
    student, teacher, mask = make(lengths)
    config = TSDKDConfig(k=4, opener=0.25)
    loss, gradient = value_and_gradient((student, teacher, mask), config)
    total, pieces = 0.0, torch.zeros_like(gradient)
    for rows in (order[:cut], order[cut:]):
        fraction = len(rows) / len(lengths)
        piece_loss, piece_gradient = value_and_gradient((student[rows], teacher[rows], mask[rows]), config)
        total += fraction * piece_loss.item()
        pieces[rows] += fraction * piece_gradient
    assert total == pytest.approx(loss.item(), rel=1e-12)
    assert torch.allclose(pieces, gradient, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_huge_logits_stay_finite(scale: float) -> None:
    student, teacher, mask = make([6, 1])
    for dtype in (torch.float32, torch.float64):
        batch = ((student.sign() * scale).to(dtype), (teacher.sign() * scale).to(dtype), mask)
        loss, gradient = value_and_gradient(batch, TSDKDConfig(k=4))
        assert torch.isfinite(loss)
        assert torch.isfinite(gradient).all()


def test_no_gradient_reaches_the_teacher() -> None:
    student, teacher, mask = make([5])
    teacher.requires_grad_()
    tsdkd_loss(student.requires_grad_(), teacher, mask, TSDKDConfig(k=4))[0].backward()
    assert teacher.grad is None


def test_temperature_divides_both_logits() -> None:
    student, teacher, mask = make([7, 3])
    warm, _ = tsdkd_loss(student, teacher, mask, TSDKDConfig(k=4, temperature=2.0))
    halved, _ = tsdkd_loss(student / 2, teacher / 2, mask, TSDKDConfig(k=4))
    assert warm.item() == pytest.approx(halved.item())


def test_a_weight_of_zero_switches_a_term_off() -> None:
    """An indirect term of weight 0 does not check k either."""
    loss, metrics = tsdkd_loss(*make([7, 3]), TSDKDConfig(k=VOCAB, alpha=0, em_weight=0))
    assert loss.item() == pytest.approx(metrics["direct"].item())
    assert not {"indirect", "entropy", "rank_agreement"} & metrics.keys()


def test_given_fractions_replace_the_fixed_one() -> None:
    student, teacher, mask = make([20, 20])
    _, metrics = tsdkd_loss(student, teacher, mask, TSDKDConfig(k=4, opener="adaptive"), torch.tensor([1e-6, 1.0]))
    assert metrics["opener_length"].item() == pytest.approx((1 + 20) / 2)


def test_bad_shapes_and_empty_rows_are_named() -> None:
    student, teacher, mask = make([4, 2])
    with pytest.raises(InputError, match="Row 1 has no response token"):
        tsdkd_loss(student, teacher, mask & torch.tensor([[True], [False]]), TSDKDConfig(k=4))
    with pytest.raises(InputError, match="shared vocabulary"):
        tsdkd_loss(student, teacher[..., :-1], mask, TSDKDConfig(k=4))
    with pytest.raises(InputError, match="mask is"):
        tsdkd_loss(student, teacher, mask[:, :-1], TSDKDConfig(k=4))


@pytest.mark.parametrize(
    "wrong",
    [{"alpha": -1}, {"beta": 1.1}, {"tau": 0}, {"k": 1}, {"opener": 0}, {"opener": "adaptiv"}, {"em_ratio": 2},
     {"temperature": 0}, {"indirect_reduction": "max"}, {"alpha": 0, "direct_weight": 0, "em_weight": 0}],
)  # fmt: skip
def test_config_refuses(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError):
        TSDKDConfig(**wrong)


def recorded(batch: Batch, k: int, top: int) -> tuple[torch.Tensor, TeacherTopK, torch.Tensor]:
    student, teacher, mask = batch
    s, t = student[mask], teacher[mask]
    candidates = s.topk(k).indices
    ranks = t.gather(-1, candidates).argsort(-1, descending=True).argsort(-1)
    best = t.log_softmax(-1).topk(top)
    return s, TeacherTopK(TeacherRanks(entropy(t), candidates, ranks), best.indices, best.values), mask


def test_recorded_ranks_give_the_indirect_and_entropy_terms_of_logits() -> None:
    batch = make([9, 4])
    s, topk, mask = recorded(batch, k=6, top=3)
    config = TSDKDConfig(k=4, direct_weight=0)  # fewer candidates than recorded
    expected, _ = tsdkd_loss(*batch, config)
    loss, metrics = token_selective_loss(s, topk.recorded, mask, config)
    assert loss.item() == pytest.approx(expected.item())
    assert "direct" not in metrics


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 1.0])
def test_topk_divergence_is_a_lower_bound_that_tightens(beta: float) -> None:
    student, teacher, mask = make([40])
    exact = TeacherLogits(teacher[mask]).divergence(student[mask].log_softmax(-1), Divergence.jsd(beta), 1.0)
    bounds = []
    for top in (1, 4, VOCAB - 1):
        s, topk, _ = recorded((student, teacher, mask), k=4, top=top)
        bounds.append(topk.divergence(s.log_softmax(-1), Divergence.jsd(beta), 1.0))
    assert (bounds[0] <= bounds[1] + 1e-9).all()
    assert (bounds[1] <= exact + 1e-6).all()
    assert torch.allclose(bounds[2], exact, atol=1e-5)


def test_recorded_signals_refuse_what_was_not_recorded() -> None:
    s, topk, mask = recorded(make([9]), k=4, top=3)
    with pytest.raises(InputError, match="only 4 candidates"):
        token_selective_loss(s, topk, mask, TSDKDConfig(k=5))
    with pytest.raises(InputError, match="temperature"):
        token_selective_loss(s, topk, mask, TSDKDConfig(k=4, temperature=2.0))
    with pytest.raises(InputError, match="no distribution"):
        token_selective_loss(s, topk.recorded, mask, TSDKDConfig(k=4))
