"""MiniLLM's gradient: held to an independent formula, and to the exact gradient in expectation over all sequences."""

from collections.abc import Iterator
from itertools import product
from math import log

import pytest
import torch

from tsdkd.core import SampledTokens, TeacherLogits, TeacherTokens, TSDKDConfig, token_selective_loss
from tsdkd.core import objective as module
from tsdkd.core.policy_gradient import importance_and_rewards, mean_future_rewards
from tsdkd.errors import InputError

CONFIG = TSDKDConfig(alpha=0, beta=1.0, gate=False, em_weight=0, policy_gradient_weight=1.0)
VOCAB = 3
Table = dict[tuple[int, ...], torch.Tensor]
"""Logits of the next token after each prefix: a model of short sequences."""


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_future_rewards_are_means_over_later_tokens() -> None:
    """Of 1, 2, 4: (2 + 4) / 2, 4, 0; a single token has 0."""
    mask = torch.tensor([[True, True, True], [True, False, False]])
    found = mean_future_rewards(torch.tensor([[1.0, 2.0, 4.0], [5.0, 0.0, 0.0]]), mask)
    assert found[mask].tolist() == [3.0, 4.0, 0.0, 0.0]


def test_importance_and_reward_by_hand() -> None:
    """q 0.5, p 0.2, then 0.25, a 0.2: w = 0.5 / (0.2 * 0.2 + 0.8 * 0.25) = 0.5 / 0.24; the reward is log 0.4."""
    q, p = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.8, 0.2]]).log()
    then = torch.tensor([0.25]).log()
    for teacher_fraction, recorded, weight in (
        (0.2, then, 0.5 / 0.24),
        (0.2, None, 0.5 / 0.44),
        (0.0, then, 2.0),
        (0, None, 1),
    ):
        sampled = SampledTokens(torch.tensor([1]), teacher_fraction, recorded)
        importance, reward = importance_and_rewards(sampled.gather(q), sampled.gather(p), sampled)
        assert importance.item() == pytest.approx(weight)
        assert reward.item() == pytest.approx(log(0.4))


@pytest.mark.parametrize("teacher_fraction", [0.0, 0.2])
def test_the_gradient_is_the_papers_written_out(teacher_fraction: float) -> None:
    """Token by token: w [grad KL(q || p) - R grad log q(y)], the mean over a response, then over responses."""
    lengths, tokens = [4, 1, 3], 8
    mask = torch.arange(4) < torch.tensor(lengths).unsqueeze(1)
    student, teacher = normal(tokens, VOCAB, seed=1).requires_grad_(), normal(tokens, VOCAB, seed=2)
    ids, then = torch.tensor([0, 2, 1, 1, 0, 2, 2, 0]), normal(tokens, VOCAB, seed=3).log_softmax(-1)
    then = then.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    loss, metrics = token_selective_loss(
        student, TeacherLogits(teacher), mask, CONFIG, None, SampledTokens(ids, teacher_fraction, then)
    )
    (found,) = torch.autograd.grad(loss, student)

    q, p = student.softmax(-1), teacher.softmax(-1)
    fixed = q.detach()
    expected, seen = torch.zeros(()), {"direct": 0.0, "policy_gradient": 0.0}
    first = 0
    for length in lengths:
        rows = range(first, first + length)
        for t in rows:
            y = ids[t]
            later = [float((p[s, ids[s]] / fixed[s, ids[s]]).log()) for s in rows if s > t]
            future = sum(later) / len(later) if later else 0.0
            w = float(fixed[t, y] / (teacher_fraction * p[t, y] + (1 - teacher_fraction) * then[t].exp()))
            kl = (q[t] * (q[t] / p[t]).log()).sum()
            expected = expected + w * (kl - future * q[t, y].log()) / length / len(lengths)
            seen["direct"] += w * float(kl.detach()) / length / len(lengths)
            seen["policy_gradient"] -= w * future / length / len(lengths)
        first += length
    (expected_grad,) = torch.autograd.grad(expected, student)
    torch.testing.assert_close(found, expected_grad, rtol=1e-9, atol=1e-12)
    assert {name: metrics[name].item() for name in seen} == pytest.approx(seen)
    assert loss.item() == pytest.approx(sum(seen.values()))


def table(length: int, seed: int) -> Table:
    starts = [start for n in range(length) for start in product(range(VOCAB), repeat=n)]
    return {start: normal(VOCAB, seed=seed + i).requires_grad_() for i, start in enumerate(starts)}


def sequences(model: Table, length: int) -> Iterator[tuple[tuple[int, ...], torch.Tensor]]:
    """All sequences, each with its log-probability."""
    for ids in product(range(VOCAB), repeat=length):
        yield ids, torch.stack([model[ids[:t]].log_softmax(-1)[ids[t]] for t in range(length)]).sum()


def estimate(
    student: Table, teacher: Table, ids: tuple[int, ...], sampled: SampledTokens | None = None
) -> torch.Tensor:
    """The loss of one response."""
    q, p = (torch.stack([model[ids[:t]] for t in range(len(ids))]) for model in (student, teacher))
    mask = torch.ones(1, len(ids), dtype=torch.bool)
    sampled = sampled or SampledTokens(torch.tensor(ids))
    return token_selective_loss(q, TeacherLogits(p.detach()), mask, CONFIG, None, sampled)[0]


def gradient(value: torch.Tensor, model: Table) -> torch.Tensor:
    return torch.cat(torch.autograd.grad(value, list(model.values())))


@pytest.mark.parametrize("length", [2, 3])
def test_in_expectation_it_is_the_gradient_of_the_sequences_reverse_kl(
    length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to 1/L. With two tokens the mean over later tokens is their sum; with three the test undoes the mean."""
    if length == 3:
        after = torch.tensor([[2.0, 1.0, 0.0]], dtype=torch.float64)
        monkeypatch.setattr(module, "mean_future_rewards", lambda *given: mean_future_rewards(*given) * after)
    student, teacher = table(length, seed=10), table(length, seed=50)
    pairs = list(zip(sequences(student, length), sequences(teacher, length), strict=True))
    exact = torch.stack([log_q.exp() * (log_q - log_p) for (_, log_q), (_, log_p) in pairs]).sum()
    expected = sum(log_q.exp().detach() * estimate(student, teacher, ids) for (ids, log_q), _ in pairs)
    torch.testing.assert_close(length * gradient(expected, student), gradient(exact, student), rtol=1e-9, atol=1e-12)


def test_length_normalisation_divides_future_rewards_by_their_number() -> None:
    """In expectation over sequences of three: each token's part of the gradient, through its own probability alone."""
    student, teacher = table(3, seed=10), table(3, seed=50)
    parts, expected = torch.zeros(()), torch.zeros(())
    for (ids, log_q), (_, log_p) in zip(sequences(student, 3), sequences(teacher, 3), strict=True):
        student_log_probs = [student[ids[:t]].log_softmax(-1)[ids[t]] for t in range(3)]
        teacher_log_probs = [teacher[ids[:t]].log_softmax(-1)[ids[t]] for t in range(3)]
        rewards = [float((p - q).detach()) for p, q in zip(teacher_log_probs, student_log_probs, strict=True)]
        assert sum(rewards) == pytest.approx(float((log_p - log_q).detach()))
        means = [(rewards[1] + rewards[2]) / 2, rewards[2], 0.0]
        chance = float(log_q.exp().detach())
        for t in range(3):
            q, p = student[ids[:t]].softmax(-1), teacher[ids[:t]].softmax(-1).detach()
            parts = parts + chance * ((q * (q / p).log()).sum() - means[t] * student_log_probs[t]) / 3
        expected = expected + chance * estimate(student, teacher, ids)
    torch.testing.assert_close(gradient(expected, student), gradient(parts, student), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("teacher_fraction", [0.0, 0.3, 1.0])
def test_importance_weights_correct_for_the_sampling_distribution(teacher_fraction: float) -> None:
    """A single token, from a mixture of the teacher and an earlier student: in expectation the KL's gradient."""
    student, teacher, earlier = table(1, seed=10), table(1, seed=50), table(1, seed=90)
    q, p, then = (model[()].log_softmax(-1) for model in (student, teacher, earlier))
    mixture = (teacher_fraction * p.exp() + (1 - teacher_fraction) * then.exp()).detach()
    expected = sum(
        mixture[y]
        * estimate(student, teacher, (y,), SampledTokens(torch.tensor([y]), teacher_fraction, then[y : y + 1].detach()))
        for y in range(VOCAB)
    )
    exact = (q.exp() * (q - p.detach())).sum()
    torch.testing.assert_close(gradient(expected, student), gradient(exact, student), rtol=1e-9, atol=1e-12)


def test_missing_inputs_and_contradicting_settings_are_refused() -> None:
    mask, logits = torch.ones(1, 2, dtype=torch.bool), torch.zeros(2, VOCAB)
    with pytest.raises(InputError, match="needs the tokens with their sampling probabilities"):
        token_selective_loss(logits, TeacherLogits(logits), mask, CONFIG)
    ids = torch.tensor([0, 1])
    with pytest.raises(InputError, match="probability of every token"):
        token_selective_loss(logits, TeacherTokens(ids), mask, CONFIG, None, SampledTokens(ids))
    for other in ({"beta": 0.9}, {"gate": True}, {"temperature": 2.0}, {"divergence": "skew-kl"}, {"direct_weight": 0}):
        with pytest.raises(InputError, match="reverse KL at every token"):
            TSDKDConfig(**{"beta": 1.0, "gate": False, "policy_gradient_weight": 1.0} | other)
    with pytest.raises(InputError, match="policy_gradient_weight is -1"):
        TSDKDConfig(policy_gradient_weight=-1.0)
