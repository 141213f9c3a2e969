"""Methods of the papers have numbers that were computed by hand from the papers' formulas, and train."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import exp
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.training import CONFIG, SAMPLING, cut, learn, metrics
from tsdkd.core import (
    Features,
    Head,
    ResponseContext,
    SampledTokens,
    SelectiveObjective,
    TeacherHidden,
    TSDKDConfig,
    Weighted,
    token_selective_loss,
    token_selective_loss_from_hidden,
)
from tsdkd.errors import InputError
from tsdkd.stages.config.train import OnlineConfig, TrainConfig
from tsdkd.stages.methods import METHODS
from tsdkd.stages.train.stage import train_online

Token = tuple[tuple[float, ...], tuple[float, ...], int]
"""The student's logits, the teacher's, and the response's token."""
A1: Token = (0, 0, 0, 0), (2, 1, 0, 0), 0
A2: Token = (4, 0, 0, 0), (4, 0, 0, 0), 0
A3: Token = (4, 0, 0, 0), (0, 3, 0, 0), 0
A4: Token = (1, 0, 0, 0), (1, 1, 0, 0), 1
A5: Token = (2, 1, 0, -1), (3, 1, 0, -1), 0
B1: Token = (3, 0, 0, 0), (0, 0, 0, 0), 0
B2: Token = (0, 1, 0, 0), (0, 1, 2, 0), 2
B3: Token = (5, 0, 0, 0), (4, 0, 0, 0), 0
A, B = (A1, A2, A3, A4, A5), (B1, B2, B3)
C: tuple[Token, ...] = (
    ((2, 1, 0, -1), (1, 3, 2, 0), 0),
    ((3, 0, 1, -2), (2, -1, 0, 1), 0),
    ((0, 2, 1, -1), (1, 0, -1, 3), 0),
)


@dataclass
class Step:
    """One call of a method's selection and loss."""

    weighted: dict[str, Weighted]
    mask: Tensor
    loss: float
    grad: Tensor
    """At the student's logits (tokens, vocab)."""
    state: dict[str, Any]

    def weights(self, loss: str = "divergence") -> list[list[float]]:
        """Of each response, the weights times its length: those of a mean over its tokens are 1."""
        grid = self.weighted[loss].weights
        return [(row[own] * int(own.sum())).tolist() for row, own in zip(grid, self.mask.unbind(), strict=True)]


def take_step(name: str, *responses: tuple[Token, ...], options: tuple[str, ...] = (), **context: Any) -> Step:
    """The reference, which the chunked loss must equal."""
    method = METHODS[name]
    rows = [token for response in responses for token in response]
    lengths = torch.tensor([len(response) for response in responses])
    mask = torch.arange(int(lengths.max())) < lengths.unsqueeze(-1)
    teacher = TeacherHidden(torch.tensor([row[1] for row in rows]).double(), Head(torch.eye(4).double()))
    ids = SampledTokens(torch.tensor([row[2] for row in rows]))
    found: list[dict[str, Weighted]] = []
    objective = method.with_losses(method.read_options(options))

    def select(features: Features) -> dict[str, Weighted]:
        found.append(objective.weigh(features))
        return found[-1]

    losses = SelectiveObjective(objective.losses, select, objective.features, objective.k, objective.scope)
    state = context.pop("state", dict(method.state))
    here = ResponseContext(state=state, **context)
    one, two = (torch.tensor([row[0] for row in rows]).double().requires_grad_() for _ in range(2))
    loss, _ = token_selective_loss(one, teacher, mask, losses, sampled=ids, context=here)
    loss.backward()
    selected = found[0]
    chunked, _ = token_selective_loss_from_hidden(
        two, Head(torch.eye(4).double()), teacher, mask, losses, sampled=ids, selected=selected, chunk=2
    )
    chunked.backward()
    torch.testing.assert_close(chunked, loss)
    torch.testing.assert_close(two.grad, one.grad)
    assert one.grad is not None
    return Step(selected, mask, loss.item(), one.grad, state)


def reverse_kl(p: Tensor, q: Tensor, y: int) -> Tensor:
    return (q * (q / p).log()).sum()


def forward_kl(p: Tensor, q: Tensor, y: int) -> Tensor:
    return (p * (p / q).log()).sum()


def top2_forward_kl(p: Tensor, q: Tensor, y: int) -> Tensor:
    best = p.topk(2).indices
    kept = p[best] / p[best].sum()
    return (kept * (kept / q[best]).log()).sum()


def minus_log_prob(p: Tensor, q: Tensor, y: int) -> Tensor:
    return -q[y].log()


def expected_grad(
    terms: list[tuple[Token, float, float, Callable[[Tensor, Tensor, int], Tensor]]], tokens: tuple[Token, ...]
) -> Tensor:
    """The gradient at the tokens' logits of the sum of weight x formula(p, q, y) at a temperature."""
    leaves = {id(token): torch.tensor(token[0]).double().requires_grad_() for token in tokens}
    total = torch.zeros(()).double()
    for token, weight, temperature, formula in terms:
        q = (leaves[id(token)] / temperature).softmax(-1)
        p = (torch.tensor(token[1]).double() / temperature).softmax(-1)
        total = total + weight * formula(p, q, token[2])
    total.backward()
    grads = [leaves[id(token)].grad for token in tokens]
    return torch.stack([torch.zeros(4).double() if grad is None else grad for grad in grads])


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_tip_scores_with_the_steps_tokens_and_selects_in_each_response() -> None:
    step = take_step("tip", A, B)
    assert step.weights() == [[2.5, 0, 2.5, 0, 0], [0, 3, 0]]
    assert step.loss == pytest.approx(0.995896, abs=1e-6)
    terms = [(A1, 0.25, 1.0, reverse_kl), (A3, 0.25, 1.0, reverse_kl), (B2, 0.5, 1.0, reverse_kl)]
    close(step.grad, expected_grad(terms, A + B))
    assert take_step("tip", A, B, options=("share=0.1",)).weights() == [[5, 0, 0, 0, 0], [0, 3, 0]]
    assert take_step("tip", A, B, options=("share=0.6",)).weights()[0] == pytest.approx([5 / 3, 0, 5 / 3, 5 / 3, 0])
    assert take_step("tip", (A2, A2), options=("share=1",)).weights() == [[1, 1]]


def test_tip_clips_the_greatest_entropies() -> None:
    """The scores of A4 and A5, 0.921389 and 0.674476, are 0.909784 and 0.666150 without the clip."""
    found = []
    mask = torch.arange(5) < torch.tensor([[5], [3]])
    entropy = torch.tensor([[1.386294, 0.26183, 0.26183, 1.268301, 0.947537], [0.529061, 1.268301, 0.119079, 0, 0]])
    kl = torch.tensor([[0.357517, 0, 2.825291, 0.087863, 0.101078], [0.857234, 0.400388, 0.013665, 0, 0]])

    class Recorded(Features):
        def ranks(self, values: Tensor) -> Tensor:
            found.append(values[self.mask].tolist())
            return super().ranks(values)

    method = METHODS["tip"]
    for options in ((), ("quantile=1",)):
        features = Recorded(mask, {"student_entropy": entropy.double(), "reverse_kl": kl.double()})
        method.with_losses(method.read_options(options)).weigh(features)
    clipped = [1, 0.114138, 1, 0.921389, 0.674476, 0.531757, 0.930364, 0.004837]
    assert found[0] == pytest.approx(clipped, abs=2e-6)
    assert found[1] == pytest.approx([1, 0.112650, 1, 0.909784, 0.666150, 0.528780, 0.920083, 0.004837], abs=2e-6)


@pytest.mark.parametrize(
    ("k", "direction", "weights", "loss"),
    [
        (1, "forward", [0.01, 1, 0.01], 0.238568),
        (2, "reverse", [0.01, 1, 0.01], 0.091537),
        (3, "forward", [1, 1, 1], 1.322487),
        (3, "reverse", [1, 1, 1], 1.165690),
    ],
)
def test_selectkd_accepts_the_students_best_token(k: int, direction: str, weights: list[float], loss: float) -> None:
    step = take_step("selectkd", C, options=(f"k={k}", f"direction={direction}"))
    assert step.weights() == [pytest.approx(weights)]
    assert step.loss == pytest.approx(loss, abs=1e-6)
    formula = forward_kl if direction == "forward" else reverse_kl
    close(step.grad, expected_grad([(t, w / 3, 1.0, formula) for t, w in zip(C, weights, strict=True)], C))


def test_selectkd_with_rejected_0_gives_rejected_tokens_no_weight() -> None:
    step = take_step("selectkd", C, options=("k=1", "rejected=0"))
    assert step.weights() == [[0, 1, 0]]
    assert step.loss == pytest.approx(0.682857 / 3, abs=1e-6)


LATE = {"step": 5, "steps": 10}


@pytest.mark.parametrize(
    ("share", "median", "temperatures", "loss"),
    [
        (0.6, "selected", {0: 1, 2: 0.684367, 3: 1.326668}, 0.828248),
        (0.6, "all", {0: 0.753768, 2: 0.629223, 3: 1}, 0.771801),
        (1.0, "selected", {1: exp(0.5), 4: 1.004852}, 0.483369),
    ],
)
def test_adakd_selects_difficult_tokens_and_gives_each_a_temperature(
    share: float, median: str, temperatures: dict[int, float], loss: float
) -> None:
    state = {"share": share, "mean": 1.0, "reference": 1.0}
    step = take_step("adakd", A, options=(f"median={median}",), state=state, **LATE)
    found = step.weighted["divergence"]
    assert isinstance(found.temperature, Tensor)
    assert {i: found.temperature[0, i].item() for i in temperatures} == pytest.approx(temperatures, abs=2e-6)
    assert step.loss == pytest.approx(loss, abs=1e-6)
    selected = [i for i in range(5) if share == 1 or i in temperatures]
    taus = {i: found.temperature[0, i].item() for i in selected}
    terms = [(A[i], tau**2 / len(selected), tau, reverse_kl) for i, tau in taus.items()]
    close(step.grad, expected_grad(terms, A))


def test_adakd_selects_from_all_responses_of_a_step() -> None:
    """The three most difficult of eight tokens, A3, B1 and B2, whatever their responses."""
    state = {"share": 0.4, "mean": 1.0, "reference": 1.0}
    step = take_step("adakd", A, B, options=("c=0",), state=state, **LATE)
    assert step.weights() == [pytest.approx([0, 0, 10 / 3, 0, 0]), pytest.approx([2, 2, 0])]
    assert step.loss == pytest.approx((2.825291 + 0.857234 + 0.400388) / 3, abs=1e-6)


def test_adakds_share_follows_the_running_mean_of_the_loss() -> None:
    method, state, shares, means = METHODS["adakd"], dict(METHODS["adakd"].state), [], []
    options = method.read_options(("decay=0.9", "warmup=0.2"))
    for step, loss in enumerate([1, 1, *[0.2] * 7, 3, 3, 3]):
        weigh = Features(
            torch.ones(1, 4).bool(), {"hellinger": torch.ones(1, 4)}, ResponseContext(None, (), None, step, 10, state)
        )
        method.with_losses(options).weigh(weigh)
        shares.append(state["share"])
        method.updated(state, {"divergence": loss}, options)
        means.append(state["mean"])
    expected = [1, 1, 0.95, 0.9025, 0.857375, 0.814506, 0.773781, 0.735092, 0.698337, 0.733254, 0.769917]
    assert shares[1:] == pytest.approx(expected, abs=1e-6)  # a step's share follows the losses before it
    expected = [1, 1, 0.92, 0.848, 0.7832, 0.72488, 0.672392, 0.625153, 0.582638, 0.824374, 1.041936]
    assert means[:-1] == pytest.approx(expected, abs=1e-6)


def test_adakds_share_stays_in_its_bounds_and_equal_models_have_a_temperature() -> None:
    for mean, share, expected in ((0.1, 0.102, 0.1), (9.0, 0.98, 1.0), (1.01, 0.5, 0.5)):
        state = {"share": share, "mean": mean, "reference": 1.0}
        assert take_step("adakd", A, state=state, **LATE).state["share"] == expected
    assert take_step("adakd", (A2, A2)).loss == pytest.approx(0, abs=1e-12)


def test_eopd_adds_the_forward_kl_where_the_teacher_is_uncertain() -> None:
    step = take_step("eopd", A, options=("k=2",))
    assert step.weights() == [[1, 1, 1, 1, 1]]
    assert step.weights("forward") == [[1, 0, 0, 1, 0]]
    assert step.loss == pytest.approx(0.945272, abs=1e-6)
    terms = [(token, 0.2, 1.0, reverse_kl) for token in A]
    terms += [(token, 0.2, 1.0, top2_forward_kl) for token in (A1, A4)]
    close(step.grad, expected_grad(terms, A))
    assert take_step("eopd", A, options=("k=4",)).loss == pytest.approx(0.762426, abs=1e-6)
    half = take_step("eopd", A, options=("k=2", "alpha=0.5"))
    assert half.loss == pytest.approx(0.674350 + 0.270922 / 2, abs=1e-6)
    assert take_step("eopd", A, options=("k=2", "tau=1.1")).weights("forward") == [[0, 0, 0, 1, 0]]


def test_eopd_renormalises_the_teacher_alone() -> None:
    """On the two best of four tokens, unnormalised, the forward KL would be -0.014954."""
    token: Token = (5, 0, 0, 0), (4, 0, 0, 0), 0
    both = [take_step("eopd", (token,), options=("k=2", "tau=0", f"alpha={alpha}")).loss for alpha in (0, 1)]
    assert both[1] - both[0] == pytest.approx(0.019849, abs=1e-6)


IW = {A: [1.5, 1.410221, 1.410221, 1.099816, 1.025652], B: [1.5, 1.253581, 1.006615]}


@pytest.mark.parametrize(("response", "value", "full"), [(A, 0.388084, 0.944173), (B, 0.112512, 0.600508)])
def test_iw_opd_weights_fall_as_disagreement_adds_up(response: tuple[Token, ...], value: float, full: float) -> None:
    step = take_step("iw-opd", response)
    assert step.weights() == [pytest.approx(IW[response], abs=1e-6)]
    assert step.loss == pytest.approx(full, abs=1e-6)
    n = len(response)
    terms = [(token, w / n, 1.0, reverse_kl) for token, w in zip(response, IW[response], strict=True)]
    close(step.grad, expected_grad(terms, response))
    step = take_step("iw-opd", response, options=("sampled=true",))
    assert step.loss == pytest.approx(value, abs=1e-6)
    advantages = {
        A1: 0.892483,
        A2: 0,
        A3: -3.085716,
        A4: 0.737260,
        A5: 0.255007,
        B1: -1.247088,
        B2: 1.249857,
        B3: -0.033478,
    }
    terms = [
        (token, w * advantages[token] / n, 1.0, minus_log_prob) for token, w in zip(response, IW[response], strict=True)
    ]
    close(step.grad, expected_grad(terms, response))


def test_iw_opd_has_trls_numbers() -> None:
    """Of huggingface/trl f2cd577, and 1 + gamma everywhere for equal models."""
    q, advantage = torch.tensor([[-1.0, -2, -3, 0]]).double(), torch.tensor([[0.2, -0.3, 0.5, 0]]).double()
    mask, method = torch.tensor([[True, True, True, False]]), METHODS["iw-opd"]
    features = Features(mask, {"student_log_prob": q, "teacher_log_prob": q + advantage})
    weights = method.with_losses(method.read_options(())).weigh(features)["divergence"].weights
    assert (3 * weights).tolist() == [pytest.approx([1.5, 1.4, 1.25, 0])]
    assert take_step("iw-opd", (A2, A2)).weights() == [[1.5, 1.5]]
    assert take_step("iw-opd", A, options=("gamma=0",)).weights() == [[1, 1, 1, 1, 1]]


FIRE = {A: [1.102730, 0.954708, 0.853095, 0.916991, 1.172476], B: [0.723429, 1.246802, 1.029770]}


def test_fire_opd_weighs_tokens_by_both_entropies() -> None:
    step = take_step("fire-opd", A, B, options=("dropped=0",))
    assert step.weights() == [pytest.approx(FIRE[A], abs=1e-6), pytest.approx(FIRE[B], abs=1e-6)]
    assert step.loss == pytest.approx((0.600714 + 0.377808) / 2, abs=1e-6)
    alone = take_step("fire-opd", A)
    assert alone.weights() == [pytest.approx([1.083451, 0.981446, 0.866861, 0.880812, 1.187430], abs=1e-6)]
    assert alone.loss == pytest.approx(0.606780, abs=1e-6)
    assert take_step("fire-opd", A, options=("alpha=0", "beta=0")).weights() == [pytest.approx([1] * 5)]


def test_fire_opd_drops_responses_that_the_teacher_finds_unlikely() -> None:
    """Of A, whose mean log p(y) is -0.975620, and B with -0.644532, B is kept; the maxima are those of both."""
    step = take_step("fire-opd", A, B)
    assert step.weights() == [[0] * 5, pytest.approx([2 * weight for weight in FIRE[B]], abs=2e-6)]
    assert step.loss == pytest.approx(0.377808, abs=1e-6)
    terms = [(token, weight / 3, 1.0, reverse_kl) for token, weight in zip(B, FIRE[B], strict=True)]
    close(step.grad, expected_grad(terms, A + B))
    mask, ones = torch.ones(5, 1).bool(), torch.ones(5, 1).double()
    likelihood = torch.tensor([[-1.2], [-0.5], [-0.9], [-0.4], [-2.0]]).double()
    features = Features(mask, {"student_entropy": ones, "teacher_entropy": ones, "teacher_log_prob": likelihood})
    method = METHODS["fire-opd"]
    weights = method.with_losses(method.read_options(())).weigh(features)["divergence"].weights
    assert weights.squeeze(-1).tolist() == pytest.approx([1.25, 1.25, 1.25, 1.25, 0])


@pytest.mark.parametrize(
    ("name", "option", "message"),
    [
        ("tip", "share=0", "share of tokens is 0"),
        ("tip", "quantile=2", "quantile of the entropies is 2"),
        ("selectkd", "rejected=-1 k=2", "weight of rejected tokens is -1"),
        ("selectkd", "k=0", "needs a number k"),
        ("selectkd", "direction=up", "direction is 'up'"),
        ("adakd", "median=mean", "median is 'mean'"),
        ("adakd", "decay=1", "option decay is 1"),
        ("adakd", "temperature=0", "not above 0"),
        ("eopd", "k=0", "k = 0"),
        ("iw-opd", "gamma=-1", "gamma is -1"),
        ("fire-opd", "dropped=1", "dropped responses is 1"),
        ("fire-opd", "beta=-1", "beta is -1"),
    ],
)
def test_options_out_of_range_are_refused(name: str, option: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        take_step(name, A, B, options=tuple(option.split()))


def settings(name: str, *options: str, **more: object) -> TrainConfig:
    return replace(CONFIG, method=name, objective=TSDKDConfig(), method_options=options, **more)


@pytest.mark.parametrize("name", ["tip", "selectkd", "adakd", "eopd", "iw-opd", "fire-opd"])
def test_training_improves_offline_and_runs_online(
    run: Path, student: Path, teacher: Path, prompts: Path, tmp_path: Path, name: str
) -> None:
    learn(run, student, tmp_path / "offline", settings(name, batch_size=10, micro_batch_size=10, epochs=3))
    first, *_, last = metrics(tmp_path / "offline")
    assert last["loss"] < first["loss"]
    online = settings(name, online=OnlineConfig(sampling=SAMPLING), epochs=1)
    train_online(prompts, str(student), str(teacher), tmp_path / "online", online)
    assert all(entry["loss"] > 0 for entry in metrics(tmp_path / "online"))


def test_adakd_resumes_with_its_schedule(
    run: Path,
    student: Path,
    tmp_path: Path,
    contents: Callable[[Path], dict[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = settings("adakd", "decay=0", "tolerance=0", "rate=0.5", epochs=2)
    learn(run, student, tmp_path / "whole", config)
    selected = [entry["divergence_selected"] for entry in metrics(tmp_path / "whole")]
    assert min(selected) < 0.6 < max(selected)
    cut(monkeypatch, 3, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        learn(run, student, tmp_path / "cut", config)
    monkeypatch.undo()
    learn(run, student, tmp_path / "cut", config)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
