"""Methods of the papers on on-policy distillation: selection, loss and gradient have the papers' numbers."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from tests.helpers.training import CONFIG, SAMPLING, learn, logits_of_two_models, metrics
from tsdkd.artifacts.reader import read_artifact
from tsdkd.core import (
    Features,
    Head,
    ResponseContext,
    SampledTokens,
    SelectiveObjective,
    TeacherLogits,
    TSDKDConfig,
    token_selective_loss,
    token_selective_loss_from_hidden,
)
from tsdkd.errors import InputError
from tsdkd.stages.config.train import OnlineConfig, TrainConfig
from tsdkd.stages.methods import METHODS
from tsdkd.stages.methods.check import try_method
from tsdkd.stages.train.prerequisites import require_responses
from tsdkd.stages.train.stage import train_online

V3 = [2.0, 1, 0], [0.0, 2, 1]
V4 = [2.0, 1, 0, -1], [0.0, 2, 1.5, -2]
"""Logits of the student and of the teacher."""
NAMES = ("rethinking-opd-topk", "pw-opsd-weights", "prune-opd-decay", "tropd-loss", "reopold")


def settings(name: str, *options: str, **more: object) -> TrainConfig:
    return replace(CONFIG, method=name, objective=TSDKDConfig(), method_options=options, **more)


def objective(name: str, *options: str) -> SelectiveObjective:
    return METHODS[name].with_losses(METHODS[name].read_options(options))


def weigh(name: str, *options: str, rows: list[list[float]], step: int = 0, **values: list[list[float]]) -> list:
    """The weights of the method's first loss at each response's tokens, times its length: 1 in a plain mean.

    `rows` gives the lengths; `values` the features.
    """
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(int(lengths.max())) < lengths.unsqueeze(-1)
    grids = {
        key: torch.zeros(mask.shape)
        .double()
        .masked_scatter(mask, torch.tensor([x for row in found for x in row]).double())
        for key, found in values.items()
    }
    found = objective(name, *options).weigh(Features(mask, grids, ResponseContext(step=step, steps=10)))
    (weighted,) = found.values()
    assert not weighted.weights[~mask].any()
    return [(row[own] * own.sum()).tolist() for row, own in zip(weighted.weights, mask, strict=True)]


def loss_and_grad(
    name: str,
    *options: str,
    tokens: tuple[list[float], list[float]],
    y: tuple[int, ...] = (0,),
    uniform: float = 0.0,
    step: int = 0,
) -> tuple[float, list[list[float]]]:
    """The loss of one response of tokens y with these logits at each, and its gradient; chunks give the reference's."""
    student = torch.tensor([tokens[0]] * len(y), dtype=torch.float64, requires_grad=True)
    hidden = student.detach().clone().requires_grad_()
    teacher = TeacherLogits(torch.tensor([tokens[1]] * len(y)).double())
    mask = torch.ones(1, len(y), dtype=torch.bool)
    more = {
        "sampled": SampledTokens(torch.tensor(y)),
        "context": ResponseContext(torch.full(mask.shape, uniform).double(), ("student",), step=step, steps=10),
    }
    chosen = objective(name, *options)
    loss, _ = token_selective_loss(student, teacher, mask, chosen, **more)
    head = Head(torch.eye(len(tokens[0])).double())
    chunked, _ = token_selective_loss_from_hidden(hidden, head, teacher, mask, chosen, chunk=1, **more)
    loss.backward()
    chunked.backward()
    assert chunked.item() == pytest.approx(loss.item(), rel=1e-9, abs=1e-12)
    torch.testing.assert_close(hidden.grad, student.grad, rtol=1e-8, atol=1e-11)
    return loss.item(), student.grad.tolist()


@pytest.mark.parametrize(
    ("k", "value", "grad"),
    [
        (1, 0, [0, 0, 0, 0]),
        (2, 1.006842, [0.589836, -0.589836, 0, 0]),
        (4, 1.077515, None),
    ],
)
def test_rethinking_opd_renormalises_on_the_students_top_k(k: int, value: float, grad: list[float] | None) -> None:
    loss, found = loss_and_grad("rethinking-opd-topk", f"k={k}", tokens=V4)
    assert loss == pytest.approx(value, abs=1e-6)
    if grad:
        assert found[0] == pytest.approx(grad, abs=1e-6)
    one, other = loss_and_grad("rethinking-opd-topk", f"k={k}", tokens=V4, y=(0, 3))
    assert one == pytest.approx(loss)
    assert other[1] == pytest.approx([x / 2 for x in found[0]])


PW_WEIGHTS = {
    1: [0.910598],
    2: [0.533156, 0.991760],
    4: [0.361035, 0.759384, 0.972005, 0.997620],
    10: [0.306894, 0.386819, 0.533156, 0.716844, 0.863181, 0.943106, 0.978016, 0.991760, 0.996947, 0.998874],
}


def test_pw_opsd_weighs_later_tokens_more() -> None:
    rows = [[0.0] * length for length in PW_WEIGHTS]
    for found, expected in zip(weigh("pw-opsd-weights", rows=rows), PW_WEIGHTS.values(), strict=True):
        assert found == pytest.approx(expected, abs=1e-6)
    losses = [[1.0, 2, 3, 4], [2.0, 1]]
    weights = weigh("pw-opsd-weights", rows=losses)
    means = [
        sum(w * x for w, x in zip(*pair, strict=True)) / len(pair[0]) for pair in zip(weights, losses, strict=True)
    ]
    assert [*means, sum(means) / 2] == pytest.approx([2.196575, 1.029035, 1.612805], abs=1e-6)


@pytest.mark.parametrize(("direction", "kl"), [("forward", 0.729908), ("reverse", 0.995723)])
def test_pw_opsd_has_the_divergence_of_its_direction(direction: str, kl: float) -> None:
    loss, grad = loss_and_grad("pw-opsd-weights", f"direction={direction}", tokens=V3, y=(0, 1, 2, 0))
    assert loss == pytest.approx(kl * sum(PW_WEIGHTS[4]) / 4, abs=1e-6)
    if direction == "forward":
        difference = [0.665241 - 0.090031, 0.244728 - 0.665241, 0.090031 - 0.244728]
        for found, weight in zip(grad, PW_WEIGHTS[4], strict=True):
            assert found == pytest.approx([weight / 4 * x for x in difference], abs=1e-6)


@pytest.mark.parametrize(
    ("options", "agreement", "expected"),
    [
        (("agreement=0.75", "drop=0.1"), [1, 0.5, 0], [1.5, 1.4, 1.3]),
        ((), [1, 0.6875, 0.75, 0.6875, 0.625, 1], [1.5, 1.49, 1.49, 1.48, 1.47, 1.47]),
        (("agreement=0.75",), [0.75, 0.5], [1.5, 1.49]),
        (("drop=0.4",), [1, 0.5, 0.75, 0.25, 0.5, 1], [1.5, 1.1, 1.1, 0.7, 0.5, 0.5]),
        ((), [0.0] * 120, [*(1.5 - 0.01 * i for i in range(1, 100)), *[0.5] * 21]),
    ],
)
def test_prune_opd_decays_with_the_tokens_that_differ(
    options: tuple[str, ...], agreement: list[float], expected: list[float]
) -> None:
    """Each response counts its own tokens: the same values follow a response that differs everywhere."""
    rows = [[0.0] * 3, agreement]
    assert weigh("prune-opd-decay", *options, rows=rows, topk_agreement=rows)[1] == pytest.approx(expected)


def test_prune_opd_weighs_the_students_top_k() -> None:
    loss, grad = loss_and_grad("prune-opd-decay", "k=2", tokens=V4, y=(0, 0))  # agreement 1/2 at both tokens
    assert loss == pytest.approx(1.006842 * (1.49 + 1.48) / 2, abs=1e-6)
    for found, weight in zip(grad, (1.49, 1.48), strict=True):
        assert found == pytest.approx([weight / 2 * x for x in (0.589836, -0.589836, 0, 0)], abs=1e-6)
    assert loss_and_grad("prune-opd-decay", "k=4", tokens=V4)[0] == pytest.approx(1.5 * 1.077515, abs=1e-6)


@pytest.mark.parametrize(
    ("y", "uniform", "value", "grad"),
    [
        (0, 0.13, 2, [0.669518, -0.489457, -0.180061]),  # trusted with probability 0.135335
        (0, 0.14, 0.909969, [0.605349, -0.442546, -0.162803]),
        (1, 0.99, -1, [0.665241, -0.755272, 0.090031]),
        (2, 0.99, -1, [0.665241, 0.244728, -0.909969]),
    ],
)
def test_tropd_draws_the_tokens_that_it_trusts(y: int, uniform: float, value: float, grad: list[float]) -> None:
    loss, found = loss_and_grad("tropd-loss", "k=2", tokens=V3, y=(y,), uniform=uniform)
    assert loss == pytest.approx(value, abs=1e-6)
    assert found[0] == pytest.approx(grad, abs=1e-6)


def test_tropd_has_the_expected_gradient() -> None:
    q, trust, expected = (0.665241, 0.244728, 0.090031), (0.135335, 1, 1), [0.0, 0, 0]
    for y in range(3):
        for uniform, probability in ((0.0, trust[y]), (0.999, 1 - trust[y])):
            _, grad = loss_and_grad("tropd-loss", "k=2", tokens=V3, y=(y,), uniform=uniform)
            expected = [e + q[y] * probability * g for e, g in zip(expected, grad[0], strict=True)]
    assert expected == pytest.approx([0.631176, -0.461426, -0.169749], abs=1e-5)


REWARDS, ENTROPIES = [0.4, -0.1, -1.0, -2.0, -4.0], [0.2, 1.5, 0.05, 0.9, 1.1]


@pytest.mark.parametrize(
    ("options", "step", "kept", "reward"),
    [
        (("mixture=0.3",), 4, [0, 1, 2], -0.233333),
        (("mixture=0.3",), 5, [1], -0.1),
        (("mixture=0.3", "share=0.4"), 5, [1, 4], -0.909981),
        (("mixture=0.3", "share=1", "switch=0"), 0, [0, 1, 2, 3, 4], -0.827984),
        (("mixture=0.1",), 0, [0, 1, 2, 3], -0.675),
        (("mixture=0.1", "share=0.4"), 9, [1, 4], -1.329214),
    ],
)
@pytest.mark.parametrize("lengths", [(5,), (3, 2), (1, 4)])
def test_reopold_selects_from_the_step_in_two_stages(
    options: tuple[str, ...], step: int, kept: list[int], reward: float, lengths: tuple[int, ...]
) -> None:
    def split(values: list[float]) -> list[list[float]]:
        ends = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
        return [values[a:b] for a, b in pairwise(ends)]

    features = {"teacher_log_prob": REWARDS, "student_log_prob": [0.0] * 5, "student_entropy": ENTROPIES}
    rows = {name: split(values) for name, values in features.items()}
    found = weigh("reopold", *options, rows=rows["student_entropy"], step=step, **rows)
    flat = [w / len(row) for row in found for w in row]
    assert [i for i, w in enumerate(flat) if w] == kept
    assert sum(flat) / len(lengths) == pytest.approx(reward, abs=1e-6)


@pytest.mark.parametrize(
    ("mixture", "step", "advantage"), [("0.3", 5, -1.719961), ("0.1", 5, -2), ("0.1", 0, -2), ("0.3", 0, 0)]
)
def test_reopolds_gradient(mixture: str, step: int, advantage: float) -> None:
    loss, grad = loss_and_grad("reopold", f"mixture={mixture}", tokens=V3, step=step)
    assert loss == pytest.approx(-advantage, abs=1e-6)
    at_2 = (0.669518, -0.489457, -0.180061)
    assert grad[0] == pytest.approx([-advantage / 2 * x for x in at_2], abs=1e-6)


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("rethinking-opd-topk", "k=0"),
        ("pw-opsd-weights", "width=0"),
        ("pw-opsd-weights", "direction=both"),
        ("prune-opd-decay", "k=0"),
        ("tropd-loss", "k=0"),
        ("reopold", "mixture=1"),
        ("reopold", "share=0"),
    ],
)
def test_options_out_of_range_are_refused(name: str, option: str) -> None:
    method = METHODS[name]
    with pytest.raises(InputError, match=f"(?i){option.partition('=')[0]}"):
        try_method(method, method.read_options((option,)))


UNMODIFIED = {"temperature": 1.0, "top_p": 1.0, "quantization": None}


@pytest.mark.parametrize("option", ["tropd-loss", "reopold", "iw-opd sampled=true"])
def test_policy_gradients_are_of_the_students_unmodified_responses(option: str) -> None:
    name, *given = option.split()
    method, options = METHODS[name], METHODS[name].read_options(given)
    method.require_authors(["student"], options)
    method.require_unmodified_sampling(UNMODIFIED, options)
    with pytest.raises(InputError, match="does not learn from responses by teacher"):
        method.require_authors(["student", "teacher"], options)
    for changed in ({"temperature": 0.7}, {"top_p": 0.9}, {"quantization": "fp8"}):
        with pytest.raises(InputError, match=f"but {next(iter(changed))} was"):
            method.require_unmodified_sampling(UNMODIFIED | changed, options)


def test_the_full_divergence_of_iw_opd_takes_all_responses() -> None:
    method = METHODS["iw-opd"]
    method.require_authors(["student", "teacher"], method.options)
    method.require_unmodified_sampling(UNMODIFIED | {"temperature": 0.7}, method.options)


@pytest.mark.parametrize(
    ("online", "message"),
    [
        (OnlineConfig(sampling=replace(SAMPLING, temperature=0.5)), "temperature was 0.5"),
        (OnlineConfig(sampling=replace(SAMPLING, policy="teacher-mixed")), "that both models sample"),
        (OnlineConfig(sampling=SAMPLING, student_fraction=0.5), "only from responses that are sampled"),
        (
            OnlineConfig(sampling=replace(SAMPLING, engine="vllm"), rollout_ahead=True),
            "--rollout-ahead samples a step earlier",
        ),
    ],
)
def test_online_policy_gradients_sample_from_the_student_alone(online: OnlineConfig, message: str) -> None:
    with pytest.raises(InputError, match=message):
        require_responses(settings("tropd-loss", online=online), None)


@pytest.mark.parametrize("name", NAMES)
def test_training_offline_begins_with_the_formula(
    run: Path, student: Path, teacher: Path, tmp_path: Path, name: str
) -> None:
    learn(run, student, tmp_path / "c", settings(name, batch_size=10, epochs=3))
    first, _, last = metrics(tmp_path / "c")
    if name == "tropd-loss":
        assert first["loss"] == pytest.approx(first["trusted"] + first["others"], rel=1e-5)
        assert first["trusted_selected"] + first["others_selected"] == pytest.approx(1, rel=1e-5)
        assert 0 < first["others_selected"] < 1
        return
    rows = read_artifact(run / "rollouts", "rollouts").table().to_pylist()
    (s, t), mask = logits_of_two_models(rows, student, teacher)
    log_q, log_p = s.double().log_softmax(-1), t.double().log_softmax(-1)
    own = [log[mask].split(mask.sum(-1).tolist()) for log in (log_q, log_p)]
    if name == "reopold":
        assert first["loss"] == pytest.approx(_reopold(rows, *own), rel=1e-4)
        assert last["policy_gradient_selected"] < 0.5 < first["policy_gradient_selected"]
    else:
        means = [FORMULAS[name](q, p) for q, p in zip(*own, strict=True)]
        assert first["loss"] == pytest.approx(sum(means) / len(means), rel=1e-4)
        assert last["loss"] < first["loss"]


def _reopold(rows: list, log_q: list[torch.Tensor], log_p: list[torch.Tensor]) -> float:
    kept = []
    for row, q, p in zip(rows, log_q, log_p, strict=True):
        kept += [r for i, y in enumerate(row["response_ids"]) if (r := float(p[i, y] - q[i, y])) >= -2.558428]
    return -sum(kept) / len(kept)


def _top(log_q: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    best = log_q.topk(16).indices
    q, p = (x.gather(-1, best).softmax(-1) for x in (log_q, log_p))
    return (q * (q / p).log()).sum(-1)


def _decayed(log_q: torch.Tensor, log_p: torch.Tensor) -> float:
    total, differ = 0.0, 0
    for loss, q, p in zip(_top(log_q, log_p), log_q, log_p, strict=True):
        differ += len(set(q.topk(16).indices.tolist()) & set(p.topk(16).indices.tolist())) < 12
        total += float(loss) * (1.5 - 0.01 * differ)
    return total / len(log_q)


def _by_position(log_q: torch.Tensor, log_p: torch.Tensor) -> float:
    reached = (torch.arange(len(log_q)) + 0.5) / len(log_q)
    weights = 0.25 + 0.75 / (1 + ((0.3 - reached) / 0.1).exp())
    return float((weights * (log_p.exp() * (log_p - log_q)).sum(-1)).mean())


FORMULAS = {
    "rethinking-opd-topk": lambda log_q, log_p: float(_top(log_q, log_p).mean()),
    "pw-opsd-weights": _by_position,
    "prune-opd-decay": _decayed,
}


@pytest.mark.parametrize("name", ["tropd-loss", "reopold"])
def test_methods_train_online(student: Path, teacher: Path, prompts: Path, tmp_path: Path, name: str) -> None:
    config = settings(name, online=OnlineConfig(sampling=SAMPLING), epochs=1)
    train_online(prompts, str(student), str(teacher), tmp_path / "c", config)
    assert all(entry["loss"] for entry in metrics(tmp_path / "c"))
