"""Objectives with a selection of one's own: chunks give the reference, features and losses have their formulas."""

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.largest_tensor import LargestTensor
from tests.helpers.objective_cases import VOCAB, Case, make, random_sampled
from tsdkd.core import (
    Divergence,
    Entropy,
    Features,
    Loss,
    PolicyGradient,
    Ranking,
    ResponseContext,
    SelectiveObjective,
    TeacherHidden,
    TeacherLogits,
    TeacherRanks,
    TeacherTokens,
    TeacherTopK,
    ToDi,
    TokenBlock,
    TopK,
    TSDKDConfig,
    Weighted,
    chunk_sizes,
    entropy,
    lm_head,
    token_features_from_hidden,
    token_selective_loss,
    token_selective_loss_from_hidden,
)
from tsdkd.core.features import FEATURES
from tsdkd.errors import InputError

KL, REVERSE_KL = Divergence.jsd(0), Divergence.jsd(1)


class SquaredError:
    """A loss of one's own: of the log-probabilities of the student's best token."""

    needs = "hidden"

    def check_vocab(self, vocab: int) -> None: ...

    def values(self, tokens: TokenBlock) -> torch.Tensor:
        best = tokens.log_q.detach().argmax(-1, keepdim=True)
        return (tokens.log_q - tokens.log_p).gather(-1, best).squeeze(-1).square()


class SummedLogProbs:
    """A loss of one's own: a sum over the vocabulary, whose gradient autograd gives as one expanded number."""

    needs = "responses"

    def check_vocab(self, vocab: int) -> None: ...

    def values(self, tokens: TokenBlock) -> torch.Tensor:
        return -tokens.log_q.sum(-1)


LOSSES: dict[str, Loss] = {
    "forward": KL,
    "jsd": Divergence.jsd(0.3),
    "skew": Divergence.skew_reverse_kl(0.2),
    "student_top": TopK(REVERSE_KL, 3, "student"),
    "teacher_top": TopK(KL, 4, "teacher", "teacher"),
    "raw_top": TopK(KL, VOCAB, "teacher", "neither"),
    "todi": ToDi(),
    "ranking": Ranking(4),
    "ranking_with_rest": Ranking(4, rest=True),
    "reversed": Ranking(3, released=True),
    "entropy": Entropy(),
    "policy_gradient": PolicyGradient(),
    "own": SquaredError(),
    "sum": SummedLogProbs(),
}
ALL_FEATURES = tuple(FEATURES)


def select_by_every_feature(losses: dict[str, Loss], tempered: bool) -> Callable[[Features], dict[str, Weighted]]:
    """Weights, some of them 0 or negative, that depend on every feature; each loss has others."""

    def select(features: Features) -> dict[str, Weighted]:
        mixed = sum(features.values[name] * (i + 1) for i, name in enumerate(ALL_FEATURES))
        assert isinstance(mixed, torch.Tensor)
        found = {}
        for i, name in enumerate(losses):
            weights = features.mean((mixed * (i + 2)).sin() > -0.3) * (mixed + i).cos()
            temperature = 1 + mixed.sin() ** 2 if tempered and i % 2 else 1 + 0.5 * (i % 3 == 2)
            found[name] = Weighted(weights, temperature, 0.5 + i)
        return found

    return select


def both(
    case: Case, objective: SelectiveObjective, chunk: int | None = None, teacher: object = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Asserts that chunks give the reference's value, metrics and gradients; returns the value and a gradient."""
    context = ResponseContext(torch.rand(case.mask.shape, generator=torch.Generator().manual_seed(1)).double())
    sampled = case.sampled or random_sampled(case)
    one, two = case.clone(), case.clone()
    signal = teacher or TeacherHidden(case.teacher[case.mask], case.teacher_head)
    loss, metrics = token_selective_loss_from_hidden(
        one.student[one.mask], one.head, signal, one.mask, objective, chunk=chunk, sampled=sampled, context=context
    )
    logits = two.head.logits(two.student)[two.mask]
    expected, expected_metrics = token_selective_loss(
        logits, signal, two.mask, objective, sampled=sampled, context=context
    )
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9, abs=1e-12)
    norms = {f"{name}_grad_norm" for name in objective.losses}
    assert metrics.keys() == expected_metrics.keys() | norms
    for name, value in expected_metrics.items():
        assert metrics[name].item() == pytest.approx(value.item(), rel=1e-9, abs=1e-12), name
    loss.backward()
    expected.backward()
    for actual, desired in zip(one.leaves(), two.leaves(), strict=True):
        torch.testing.assert_close(actual.grad, desired.grad, rtol=1e-8, atol=1e-11)
    return loss, one.student.grad


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    seed=st.integers(0, 10**6),
    chunk=st.sampled_from([1, 7, None]),
    block=st.sampled_from([1, 60, 2**19]),
    names=st.sets(st.sampled_from(sorted(LOSSES)), min_size=1),
    tempered=st.booleans(),
    head=st.sampled_from([{}, {"bias": True}, {"logit_scale": 0.5, "softcap": 2.0}]),
    padding_rows=st.sampled_from([0, 3]),
    row_step=st.sampled_from([1, 2, 8]),
)
def test_chunks_give_the_reference_for_every_loss_and_feature(
    lengths: list[int],
    seed: int,
    chunk: int | None,
    block: int,
    names: set[str],
    tempered: bool,
    head: dict[str, object],
    padding_rows: int,
    row_step: int,
) -> None:
    losses = {name: LOSSES[name] for name in sorted(names)}
    objective = SelectiveObjective(losses, select_by_every_feature(losses, tempered), ALL_FEATURES, k=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(chunk_sizes.BLOCK_LOGITS, "cpu", block)
        patch.setitem(lm_head.ROW_STEP, "cpu", row_step)
        both(make(lengths, seed, padding_rows=padding_rows, **head), objective, chunk)


@pytest.mark.parametrize("share", [0.3, 1.0])
@pytest.mark.parametrize("chunk", [1, 5, None])
def test_weights_that_are_known_before_the_first_pass_give_the_same(share: float, chunk: int | None) -> None:
    """At share 1 the first pass accumulates the divergence's gradient, at 0.3 the second pass does."""

    def select(features: Features) -> dict[str, torch.Tensor]:
        chosen = features.mean(features.top_share(features.uniform, share))
        return {"forward": chosen * (features.position + 1), "entropy": -chosen}

    objective = SelectiveObjective({"forward": KL, "entropy": Entropy()}, select, ("uniform",))
    assert objective.selects_before
    both(make([9, 4, 1], bias=True), objective, chunk)


def test_tsd_kd_as_a_selection_is_tsd_kd() -> None:
    config = TSDKDConfig(k=4)

    def select(features: Features) -> dict[str, Weighted | torch.Tensor]:
        from tsdkd.core import opener_mask, uncertainty_gate

        entropies = features.student_entropy, features.teacher_entropy
        return {
            "indirect": Weighted(features.mean(opener_mask(entropies[0], features.mask, 0.1)), factor=config.alpha),
            "direct": features.mean(features.mask) * uncertainty_gate(*entropies, 1.0),
            "entropy": features.mean(features.top_share(entropies[0], 0.1)),
        }

    losses = {"indirect": Ranking(4), "direct": config.formula, "entropy": Entropy()}
    objective = SelectiveObjective(losses, select, ("student_entropy", "teacher_entropy"))
    case = make([12, 5])
    value, grad = both(case, objective)
    own = case.clone()
    teacher = TeacherHidden(case.teacher[case.mask], case.teacher_head)
    expected, _ = token_selective_loss_from_hidden(own.student[own.mask], own.head, teacher, own.mask, config)
    expected.backward()
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(grad, own.student.grad)


def test_weights_selected_beforehand_give_the_same() -> None:
    losses = {name: LOSSES[name] for name in ("forward", "ranking", "todi")}
    names = tuple(name for name in ALL_FEATURES if name != "uniform")

    def select(f: Features) -> dict[str, torch.Tensor]:
        zeros = f.mean(f.mask) * 0
        return {"forward": f.mean(f.mask) * f.hellinger, "ranking": f.mean(f.teacher_rank > 0), "todi": zeros}

    objective = SelectiveObjective(losses, select, names, k=3)
    case = make([6, 3])
    own, sampled = case.clone(), random_sampled(case)
    teacher = TeacherHidden(case.teacher[case.mask], case.teacher_head)
    inputs = own.student[own.mask], own.head, teacher, own.mask, objective
    found = token_features_from_hidden(*inputs, sampled.ids, chunk=4)
    assert found.keys() == set(names)
    grids = {name: torch.zeros(case.mask.shape).double().masked_scatter(case.mask, v) for name, v in found.items()}
    selected = objective.weigh(Features(case.mask, grids))
    loss, _ = token_selective_loss_from_hidden(*inputs, sampled=sampled, selected=selected)
    expected, _ = token_selective_loss_from_hidden(*inputs, sampled=sampled)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)


def logits_block(student: list[float], teacher: list[float], y: int = 0, temperature: float = 1.0) -> TokenBlock:
    z = torch.tensor([student], dtype=torch.float64, requires_grad=True)
    block = TokenBlock(
        (z / temperature).log_softmax(-1),
        TeacherLogits(torch.tensor([teacher]).double()),
        temperature,
        torch.tensor([y]),
    )
    BLOCKS[id(block)] = z
    return block


BLOCKS: dict[int, torch.Tensor] = {}


def value_and_grad(loss: Loss, block: TokenBlock) -> tuple[float, list[float]]:
    z = BLOCKS[id(block)]
    z.grad = None
    value = loss.values(block)
    value.sum().backward()
    return value.item(), z.grad[0].tolist()


V3 = [2.0, 1, 0], [0.0, 2, 1]
V4 = [2.0, 1, 0, -1], [0.0, 2, 1.5, -2]


@pytest.mark.parametrize(
    ("loss", "block", "value", "grad"),
    [
        (ToDi(), logits_block(*V3), 1.725631, [1.027401, -0.751091, -0.276311]),
        (ToDi(), logits_block(*V3, temperature=2), 0.480235, [0.275038, -0.171200, -0.103838]),
        (ToDi(0), logits_block([1.0, 0, -1], [0.5, 0.5, -2]), 0.130431, None),
        (TopK(REVERSE_KL, 2, "student"), logits_block(*V4), 1.006842, [0.589836, -0.589836, 0, 0]),
        (TopK(REVERSE_KL, 1, "student"), logits_block(*V4), 0, [0, 0, 0, 0]),
        (TopK(KL, 2, "teacher", "neither"), logits_block(*V3), 0.909969, [0.605349, -0.442546, -0.162803]),
        (TopK(KL, 2, "teacher", "teacher"), logits_block(*V3), 1.094344, None),
        (TopK(KL, 2, "teacher", "both"), logits_block(*V3), 0, [0, 0, 0]),
        (PolicyGradient(), logits_block(*V3, y=1), -1, [0.665241, -0.755272, 0.090031]),
        (KL, logits_block(*V3), 0.729908, None),
    ],
)
def test_losses_have_the_papers_numbers(loss: Loss, block: TokenBlock, value: float, grad: list[float] | None) -> None:
    found, gradient = value_and_grad(loss, block)
    assert found == pytest.approx(value, abs=1e-6)
    if grad is not None:
        assert gradient == pytest.approx(grad, abs=1e-6)


def test_the_rest_of_the_vocabulary_ranks_by_its_mass() -> None:
    """Candidates 0 and 1; the teacher ranks token 1 (0.568), the rest (0.355), token 0 (0.077)."""
    block = logits_block(*V4)
    q = [math.exp(z) for z in V4[0]]
    rest = q[2] + q[3]
    expected = -math.log(q[1] / sum(q)) - math.log(rest / (rest + q[0]))
    value, grad = value_and_grad(Ranking(2, rest=True), block)
    assert value == pytest.approx(expected, rel=1e-9)
    assert sum(grad) == pytest.approx(0, abs=1e-12)
    assert grad[2] != pytest.approx(0)
    _, without_rest = value_and_grad(Ranking(2), logits_block(*V4))
    assert without_rest[:2] == pytest.approx([-without_rest[1], without_rest[1]])  # blind to a common shift
    assert without_rest[2:] == pytest.approx([0, 0], abs=1e-12)
    assert grad[0] + grad[1] != pytest.approx(0, abs=1e-3)


def test_features_have_their_formulas() -> None:
    student, teacher = torch.tensor(V4[0]).double(), torch.tensor(V4[1]).double()
    q, p = student.softmax(-1), teacher.softmax(-1)
    found: list[Features] = []

    def select(features: Features) -> dict[str, torch.Tensor]:
        found.append(features)
        return {"forward": features.mean(features.mask)}

    objective = SelectiveObjective({"forward": KL}, select, ALL_FEATURES, k=2)
    from tsdkd.core import SampledTokens

    mask = torch.tensor([[True, False, True]])
    uniform = torch.tensor([[0.1, 0.2, 0.3]])
    token_selective_loss(
        torch.stack([student, student]),
        TeacherLogits(torch.stack([teacher, teacher])),
        mask,
        objective,
        sampled=SampledTokens(torch.tensor([2, 0])),
        context=ResponseContext(uniform, ("student",), torch.tensor([5]), step=3, steps=9),
    )
    (features,) = found
    expected = {
        "student_entropy": -(q * q.log()).sum(),
        "teacher_entropy": -(p * p.log()).sum(),
        "forward_kl": (p * (p / q).log()).sum(),
        "reverse_kl": (q * (q / p).log()).sum(),
        "jsd": sum((a * (2 * a / (p + q)).log()).sum() / 2 for a in (p, q)),
        "hellinger": (1 - (p * q).sqrt().sum()).sqrt(),
        "teacher_rank": 2.0,
        "topk_agreement": 0.5,
        "student_outside_mass": q[2] + q[3],
        "teacher_outside_mass": p[2] + p[3],
    }
    for name, value in expected.items():
        grid = getattr(features, name)
        assert grid[0, [0, 2]].tolist() == pytest.approx([float(value)] * 2), name
        assert grid[0, 1] == 0
    assert features.student_log_prob[0].tolist() == pytest.approx([q[2].log().item(), 0, q[0].log().item()])
    assert features.teacher_log_prob[0].tolist() == pytest.approx([p[2].log().item(), 0, p[0].log().item()])
    assert features.uniform[0].tolist() == pytest.approx([0.1, 0, 0.3])
    assert (features.authors, features.prompts.tolist(), features.step, features.steps) == (("student",), [5], 3, 9)
    assert features.length.tolist() == [[2]]
    assert features.position[mask].tolist() == [0, 1]
    assert features.ranks(features.uniform).tolist()[0][2] == 0
    assert features.batch_ranks(features.uniform)[mask].tolist() == [1, 0]


def recorded_teachers(case: Case) -> dict[str, object]:
    s = case.head.logits(case.student)[case.mask].detach()
    t = s + torch.randn(s.shape, generator=torch.Generator().manual_seed(1), dtype=s.dtype)
    candidates = s.topk(6).indices
    ranks = TeacherRanks(entropy(t), candidates, t.gather(-1, candidates).argsort(-1, descending=True).argsort(-1))
    best = t.log_softmax(-1).topk(8)
    return {
        "topk": TeacherTopK(ranks, best.indices, best.values),
        "ranks": ranks,
        "responses": TeacherTokens(best.indices[:, 0]),
    }


@pytest.mark.parametrize("signal", ["topk", "ranks", "responses"])
def test_each_loss_and_feature_is_formed_from_its_least_signal(signal: str) -> None:
    """For less it is refused by name."""
    case = make([7, 3])
    teacher = recorded_teachers(case)[signal]
    order = ("responses", "ranks", "topk", "hidden")
    losses = {
        n: loss for n, loss in LOSSES.items() if n != "raw_top" and loss.needs in order[: order.index(signal) + 1]
    }
    features = tuple(n for n, needs in FEATURES.items() if needs in order[: order.index(signal) + 1])

    def select(found: Features) -> dict[str, torch.Tensor]:
        mixed = sum(found.values[name] for name in features)
        return {name: found.mean(mixed.sin() > 0) * i for i, name in enumerate(losses, 1)}

    objective = SelectiveObjective(losses, select, features, k=3)
    objective.require_signal(signal)
    both(case, objective, teacher=teacher)
    others = dataclasses.replace(objective, losses={**losses, "todi": ToDi()}, features=(*features, "hellinger"))
    with pytest.raises(InputError, match=r"the loss todi, the feature hellinger"):
        others.require_signal(signal)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"losses": {}}, "no loss"),
        ({"features": ("entropy",)}, "Unknown feature 'entropy'"),
        ({"features": ("teacher_rank",)}, "needs a number k"),
        ({"select": lambda f: {"forwards": f.mean(f.mask)}}, "'forwards', which is no loss"),
        ({"select": lambda f: f.mean(f.mask)}, "which is no loss"),
        ({"select": lambda f: {}}, "gives no weights of forward"),
        ({"select": lambda f: {"forward": f.mean(f.mask)[0]}}, "has shape"),
        ({"select": lambda f: {"forward": 1.0}}, "is 1.0, and the mask"),
        ({"select": lambda f: {"forward": f.mean(f.mask) / 0}}, "not finite"),
        ({"select": lambda f: {"forward": Weighted(f.mean(f.mask), 0.0)}}, "not above 0"),
        ({"select": lambda f: {"forward": Weighted(f.mean(f.mask), f.mean(f.mask)[:1])}}, "temperatures of forward"),
        ({"select": lambda f: {"forward": f.student_entropy}}, "does not declare"),
        ({"select": lambda f: {"forward": f.mean(f.top_share(f.mask, 0))}}, "share of tokens is 0"),
        ({"losses": {"forward": Ranking(VOCAB)}}, "vocabulary has only"),
        ({"losses": {"forward": TopK(KL, VOCAB + 1, "student")}}, "vocabulary has only"),
        ({"features": ("teacher_rank",), "k": VOCAB + 1}, "vocabulary has only"),
        ({"features": ("uniform",)}, "random numbers"),
    ],
)
def test_wrong_objectives_and_selections_are_refused(changes: dict[str, object], message: str) -> None:
    case = make([4, 2])
    teacher = TeacherHidden(case.teacher[case.mask], case.teacher_head)
    arguments = {"losses": {"forward": KL}, "select": lambda f: {"forward": f.mean(f.mask)}, "features": ()} | changes
    student = case.student[case.mask]
    with pytest.raises(InputError, match=message):
        token_selective_loss_from_hidden(student, case.head, teacher, case.mask, SelectiveObjective(**arguments))
    with pytest.raises(InputError, match=message):
        token_selective_loss(case.head.logits(student), teacher, case.mask, SelectiveObjective(**arguments))


@pytest.mark.parametrize("padding", [0.0, math.nan])
def test_weights_and_temperatures_off_the_responses_do_not_count(padding: float) -> None:
    """A mask of no token has mean weights 0, and padding in a mask has weight 0."""

    def select(f: Features) -> dict[str, Weighted]:
        filled = torch.where(f.mask, 2.0, padding)
        assert f.mean(~f.mask).tolist() == f.mean(f.mask & (f.position > 9)).tolist() == [[0.0] * 4] * 2
        return {"forward": Weighted(f.mean(torch.ones_like(f.mask)) * filled, filled)}

    _, grad = both(make([4, 2]), SelectiveObjective({"forward": KL}, select))
    assert grad.isfinite().all()
    assert grad.any()


def test_compiled_and_tempered_recorded_signals_are_refused() -> None:
    case = make([4])
    signal = TeacherHidden(case.teacher[case.mask], case.teacher_head)
    own = SelectiveObjective({"forward": KL}, lambda f: {"forward": Weighted(f.mean(f.mask), 2.0)})
    with pytest.raises(InputError, match="compiled"):
        token_selective_loss_from_hidden(case.student[case.mask], case.head, signal, case.mask, own, compiled=True)
    topk = recorded_teachers(case)["topk"]
    with pytest.raises(InputError, match="hold at temperature 1"):
        token_selective_loss_from_hidden(case.student[case.mask], case.head, topk, case.mask, own)
    for wrong in (
        lambda: Ranking(1),
        lambda: TopK(KL, 0, "student"),
        lambda: TopK(Divergence.jsd(0.5), 3, "teacher", "neither"),
    ):
        with pytest.raises(InputError):
            wrong()


def test_memory_does_not_grow_with_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor has as many numbers as the logits of all tokens, for every loss."""
    monkeypatch.setitem(chunk_sizes.CHUNK_BYTES, "cpu", 1)  # chunks of TOKEN_STEP tokens
    monkeypatch.setitem(chunk_sizes.BLOCK_LOGITS, "cpu", 100)
    losses = {name: loss for name, loss in LOSSES.items() if name != "policy_gradient"}
    objective = SelectiveObjective(
        losses, lambda f: {name: f.mean(f.mask) for name in losses}, ("hellinger", "jsd"), k=3
    )
    case = make([400])
    teacher = TeacherHidden(case.teacher[case.mask], case.teacher_head)
    with LargestTensor() as largest:
        loss, _ = token_selective_loss_from_hidden(case.student[case.mask], case.head, teacher, case.mask, objective)
        loss.backward()
    assert largest.elements < 400 * VOCAB
