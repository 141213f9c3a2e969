"""Every method with its paper's settings on random logits: loss and gradient are those of the formula, written out."""

from collections.abc import Callable
from math import log

import pytest
import torch
from torch import Tensor

from tsdkd.core import Features, ResponseContext, SampledTokens, TeacherLogits, token_selective_loss
from tsdkd.stages.methods import METHODS

LENGTHS, VOCAB = (10, 3, 7, 1), 70
RESPONSES = [range(10), range(10, 13), range(13, 20), range(20, 21)]
GENERATOR = torch.Generator().manual_seed(23)
NOISE, STUDENT = (torch.randn(21, VOCAB, generator=GENERATOR, dtype=torch.float64) for _ in range(2))
STUDENT *= torch.linspace(1, 6, 21)[torch.randperm(21, generator=GENERATOR), None]
TEACHER = STUDENT + NOISE * torch.linspace(0.2, 2.4, 21)[torch.randperm(21, generator=GENERATOR), None]
IDS = torch.randint(VOCAB, (21,), generator=GENERATOR)
UNIFORM = torch.rand(21, generator=GENERATOR, dtype=torch.float64)
MEAN = torch.cat([torch.full((length,), 1 / length / 4, dtype=torch.float64) for length in LENGTHS])
"""The weights of the mean over a response's tokens, then over responses."""

P = TEACHER.softmax(-1)
Q = STUDENT.softmax(-1)
"""Without gradient: what weights are formed from."""
LOG_RATIO = (P / Q).log()[range(21), IDS]


def entropy(p: Tensor) -> Tensor:
    return -(p * p.log()).sum(-1)


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum(-1)


def mean_of_best(scores: Tensor, count: Callable[[int], int]) -> Tensor:
    """Weights of the mean over each response's tokens of the greatest scores, then over responses."""
    weights = torch.zeros(21).double()
    for response in RESPONSES:
        best = sorted(response, key=lambda i: -float(scores[i]))[: count(len(response))]
        weights[best] = 1 / len(best) / 4
    return weights


def fifth(length: int) -> int:
    """ceil(length / 5)"""
    return -(-length // 5)


def se_kd(q: Tensor) -> Tensor:
    return mean_of_best(entropy(Q), fifth) @ kl(P, q)


def random_kd(q: Tensor) -> Tensor:
    return mean_of_best(UNIFORM, fifth) @ kl(P, q)


def tip(q: Tensor) -> Tensor:
    ordered = entropy(Q).sort().values
    place = 0.98 * 20  # the quantile, interpolated linearly
    cut = ordered[19] + (place - 19) * (ordered[20] - ordered[19])
    h, d = entropy(Q).minimum(cut), kl(Q, P)
    h, d = ((x - x.min()) / (x.max() - x.min()) for x in (h, d))
    return mean_of_best(h + d - h * d, lambda length: max(1, length // 2)) @ kl(q, P)


def selectkd(q: Tensor) -> Tensor:
    accepted = [int(Q[i].argmax()) in P[i].topk(5).indices.tolist() for i in range(21)]
    assert 0 < sum(accepted) < 21
    return (MEAN * torch.tensor([1 if x else 0.01 for x in accepted], dtype=torch.float64)) @ kl(P, q)


def adakd(q: Tensor) -> Tensor:
    """During the warm-up: all tokens."""
    difficulty = (1 - (P * Q).sqrt().sum(-1)).sqrt()
    tau = (-0.5 * (difficulty / difficulty.sort().values[10]).log().tanh()).exp().unsqueeze(-1)
    at_tau = [(x.log() / tau).softmax(-1) for x in (q, P)]
    return (tau.squeeze(-1) ** 2 * kl(*at_tau)).mean()


def eopd(q: Tensor) -> Tensor:
    ids = P.topk(16).indices
    p = P.gather(-1, ids) / P.gather(-1, ids).sum(-1, keepdim=True)
    uncertain = entropy(P) > 0.8
    assert 0 < uncertain.sum() < 21
    return MEAN @ (kl(q, P) + uncertain * (p * (p / q.gather(-1, ids)).log()).sum(-1))


def iw_opd(q: Tensor) -> Tensor:
    weights = torch.zeros(21).double()
    for response in RESPONSES:
        for i in response:
            before = sum(abs(float(LOG_RATIO[k])) for k in range(response[0], i))
            weights[i] = 1 + 0.5 * (1 - before / sum(abs(float(LOG_RATIO[k])) for k in response))
    return (MEAN * weights) @ kl(q, P)


def fire_opd(q: Tensor) -> Tensor:
    """Of four responses the quantile 0.2 drops the least likely one."""
    log_p = P.log()[range(21), IDS]
    worst = min(range(4), key=lambda i: float(log_p[RESPONSES[i]].mean()))
    weights = (2 - entropy(P) / entropy(P).max()) * (1 + entropy(Q) / entropy(Q).max())
    kept = [r for i, r in enumerate(RESPONSES) if i != worst]
    return torch.stack([(weights[r] / weights[r].mean() * kl(q, P)[r]).mean() for r in kept]).mean()


def tropd_loss(q: Tensor) -> Tensor:
    ids = P.topk(64).indices
    trusted = LOG_RATIO.exp().clamp(max=1) > UNIFORM
    assert 0 < trusted.sum() < 21
    others = (P * (P / q).log()).gather(-1, ids).sum(-1)
    return MEAN @ torch.where(trusted, policy_gradient(q), others)


def policy_gradient(q: Tensor, advantage: Tensor = LOG_RATIO) -> Tensor:
    """-A at the response's token, with the gradient of -A log q(y)."""
    q_y = q[range(21), IDS]
    return -advantage * q_y / q_y.detach()


def reopold(q: Tensor) -> Tensor:
    """Of the first half of the steps: without the tokens below the floor log(0.1) / 0.9."""
    kept = LOG_RATIO > -2.5584278811
    assert 0 < kept.sum() < 21
    return policy_gradient(q)[kept].mean()


def reopold_late(q: Tensor) -> Tensor:
    """The greatest fifth of 21 entropies, of which the 0.8 quantile is the 17th, and the floor."""
    kept = entropy(Q).topk(5).indices
    return policy_gradient(q, LOG_RATIO.clamp(min=-2.5584278811))[kept].mean()


def rethinking(q: Tensor) -> Tensor:
    ids = Q.topk(16).indices
    return kl(*(x.gather(-1, ids) / x.gather(-1, ids).sum(-1, keepdim=True) for x in (q, P)))


def prune_opd_decay(q: Tensor) -> Tensor:
    weights = []
    for response in RESPONSES:
        differ = 0
        for i in response:
            differ += len(set(Q[i].topk(16).indices.tolist()) & set(P[i].topk(16).indices.tolist())) < 12
            weights.append(1.5 - 0.01 * differ)
    assert len(set(weights)) > 2
    return (MEAN * torch.tensor(weights, dtype=torch.float64)) @ rethinking(q)


def pw_opsd_weights(q: Tensor) -> Tensor:
    reached = torch.tensor([(t + 0.5) / length for length in LENGTHS for t in range(length)], dtype=torch.float64)
    return (MEAN * (0.25 + 0.75 / (1 + (-(reached - 0.3) / 0.1).exp()))) @ kl(P, q)


def todi(q: Tensor) -> Tensor:
    a = P / (P + Q)
    return MEAN @ (a * P * (P / q).log() + (1 - a) * q * (q / P).log()).sum(-1)


def tsdkd_complement(q: Tensor, em_weight: float = 1.0) -> Tensor:
    opener = torch.zeros(21).double()
    for response in RESPONSES:
        own = entropy(Q)[response]
        end = next(i for i in range(len(own)) if own[: i + 1].sum() >= 0.1 * own.sum()) + 1
        opener[response[:end]] = 1 / end / 4
    m = 0.9 * P + 0.1 * q
    jsd = 0.9 * kl(P, m) + 0.1 * kl(q, m)
    gate = 1 / (1 + (entropy(P) - entropy(Q)).exp())
    uncertain = mean_of_best(entropy(Q), lambda length: -(-length // 10))
    return 0.1 * opener @ ranking_with_rest(q) + MEAN @ (gate * jsd) + em_weight * uncertain @ entropy(q)


def ranking_with_rest(q: Tensor) -> Tensor:
    """Ten candidates and the rest: one choice after the other among what is left, in the teacher's order."""
    values = []
    for i in range(21):
        ids = Q[i].topk(10).indices
        own, teachers = (torch.cat([x[i][ids], (1 - x[i][ids].sum()).reshape(1)]) for x in (q, P))
        order = teachers.argsort(descending=True)
        values.append(-sum((own[order[j]] / own[order[j:]].sum()).log() for j in range(11)))
    return torch.stack(values)


FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "se-kd": se_kd,
    "random-kd": random_kd,
    "tip": tip,
    "selectkd": selectkd,
    "adakd": adakd,
    "eopd": eopd,
    "iw-opd": iw_opd,
    "fire-opd": fire_opd,
    "tropd-loss": tropd_loss,
    "reopold": reopold,
    "reopold, late": reopold_late,
    "rethinking-opd-topk": lambda q: MEAN @ rethinking(q),
    "prune-opd-decay": prune_opd_decay,
    "pw-opsd-weights": pw_opsd_weights,
    "todi": todi,
    "tsdkd-complement": tsdkd_complement,
    "tsdkd-complement, em_weight=0.25": lambda q: tsdkd_complement(q, 0.25),
}


@pytest.mark.parametrize("case", FORMULAS)
def test_a_step_with_the_papers_settings(case: str) -> None:
    name, _, variant = case.partition(", ")
    method = METHODS[name]
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS).unsqueeze(-1)
    context = ResponseContext(
        torch.zeros(mask.shape).double().masked_scatter(mask, UNIFORM),
        ("student",) * 4,
        step=5 if variant == "late" else 0 if method.state else 4,
        steps=10,
        state=dict(method.state),
    )
    one, two = (STUDENT.clone().requires_grad_() for _ in range(2))
    objective = method.with_losses(method.read_options((variant,) if "=" in variant else ()))
    teacher, ids = TeacherLogits(TEACHER), SampledTokens(IDS)
    loss, _ = token_selective_loss(one, teacher, mask, objective, sampled=ids, context=context)
    expected = FORMULAS[case](two.softmax(-1))
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(one.grad, two.grad, rtol=1e-9, atol=1e-12)


def test_adakds_schedule_has_the_codes_numbers() -> None:
    """The share falls when 0.99^n reaches 0.95 of its value after the warm-up of 2 of 40 steps, or at the last fall."""
    method, state, shares = METHODS["adakd"], dict(METHODS["adakd"].state), []
    options = method.read_options(())
    for step in range(15):
        values = {"hellinger": torch.ones(1, 4).double()}
        context = ResponseContext(step=step, steps=40, state=state)
        method.with_losses(options).weigh(Features(torch.ones(1, 4).bool(), values, context))
        shares.append(state["share"])
        method.updated(state, {"divergence": float(step < 2)}, options)
    assert shares == pytest.approx([1] * 8 + [0.95] * 6 + [0.9025])


@pytest.mark.parametrize(
    ("name", "loss", "values", "expected"),
    [
        ("selectkd", "divergence", {"teacher_rank": [0, 4, 5, 5]}, [1, 1, 0.01, 0.01]),
        ("eopd", "forward", {"teacher_entropy": [0.5, 0.79, 0.8, 2]}, [0, 0, 1, 1]),
        ("adakd", "divergence", {"hellinger": [0.1, 0.1, 0.1, 0.05]}, [4 / 3, 4 / 3, 4 / 3, 0]),
        (
            "reopold",
            "policy_gradient",
            {
                "teacher_log_prob": [0, -1, -2.559, log(0.1) / 0.9],
                "student_log_prob": [0] * 4,
                "student_entropy": [1] * 4,
            },
            [0, -4 / 3, 0, 4 / 3 * log(0.1) / 0.9],
        ),
    ],
)
def test_tokens_at_the_bounds(name: str, loss: str, values: dict[str, list[float]], expected: list[float]) -> None:
    """AdaKD takes floor(0.9 x 4) tokens."""
    features = {key: torch.tensor([row], dtype=torch.float64) for key, row in values.items()}
    context = ResponseContext(step=0, steps=10, state={"share": 0.9, "mean": None, "reference": None})
    method = METHODS[name]
    found = method.with_losses(method.read_options(())).weigh(Features(torch.ones(1, 4).bool(), features, context))
    assert (4 * found[loss].weights[0]).tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("options", "value", "grad"),
    [
        ((), 1.725631, [1.027401, -0.751091, -0.276311]),
        (("temperature=2",), 0.480235, [0.275038, -0.171200, -0.103838]),
        (("beta=0",), 1.725631 / 2, None),
    ],
)
def test_todi_has_its_options(options: tuple[str, ...], value: float, grad: list[float] | None) -> None:
    """Without a factor for the temperature; beta 0 halves KL(p || q) + KL(q || p)."""
    student = torch.tensor([[2.0, 1, 0]]).double().requires_grad_()
    teacher = TeacherLogits(torch.tensor([[0.0, 2, 1]]).double())
    objective = METHODS["todi"].with_losses(METHODS["todi"].read_options(options))
    loss, _ = token_selective_loss(student, teacher, torch.ones(1, 1).bool(), objective)
    loss.backward()
    assert loss.item() == pytest.approx(value, abs=1e-6)
    assert grad is None or student.grad.tolist()[0] == pytest.approx(grad, abs=1e-6)


def test_se_kd_of_the_students_responses() -> None:
    """direction=reverse takes KL(q || p), which the paper has on the student's responses; share=0.5 rounds up."""
    method = METHODS["se-kd"]
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS).unsqueeze(-1)
    objective = method.with_losses(method.read_options(("direction=reverse", "share=0.5")))
    loss, _ = token_selective_loss(STUDENT, TeacherLogits(TEACHER), mask, objective)
    expected = mean_of_best(entropy(Q), lambda length: (length + 1) // 2) @ kl(Q, P)
    torch.testing.assert_close(loss, expected, rtol=1e-11, atol=1e-11)
