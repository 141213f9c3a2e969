"""Every signal satisfies the protocol; how much of the divergence the recorded top K loses; the most likely token."""

import math

import pytest
import torch

from tsdkd.core import (
    Divergence,
    Head,
    SeveralTeachers,
    TeacherHidden,
    TeacherLogits,
    TeacherRanks,
    TeacherSignal,
    TeacherTokens,
    TeacherTopK,
    generalized_jsd,
)
from tsdkd.core.recorded_signals import TopKRanks
from tsdkd.core.teacher_signals import argmax
from tsdkd.errors import InputError

TOKENS, VOCAB = 200, 60


def signals() -> list[TeacherSignal]:
    """One of each kind, for the same five tokens."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(5, 3, generator=generator), torch.randn(VOCAB, 3, generator=generator)
    logits = hidden @ weight.T
    ids = logits.topk(4).indices
    ranks = TeacherRanks(torch.ones(5), ids, torch.arange(4).expand(5, 4))
    top = TeacherTopK(ranks, ids, logits.log_softmax(-1).gather(-1, ids))
    whole = TeacherHidden(hidden, Head(weight))
    several = SeveralTeachers.of(
        [whole.take(slice(0)), whole.take(torch.tensor([1, 4])), whole.take(torch.tensor([0, 2, 3]))],
        torch.tensor([2, 1, 2, 2, 1]),
    )
    return [whole, TeacherLogits(logits), ranks, top, TeacherTokens(ids[:, 0]), several]


def test_the_top_k_ranks_any_candidates() -> None:
    """The student proposes 3, 0, 4, 2, 1; the teacher's top 2 are 2 and 0, the others are tied."""
    student = torch.tensor([[3.0, 0.0, 1.0, 4.0, 2.0]])
    top = TopKRanks(torch.ones(1), torch.tensor([[2, 0]]), torch.tensor([[-0.5, -1.5]]))
    assert top.ranked_candidates(student, 4).tolist() == [[2, 0, 3, 4]]
    assert TeacherTopK(top, top.top_ids, top.top_log_probs).take(slice(1)).ranked_candidates(student, 2).tolist() == [
        [0, 3]
    ]
    with pytest.raises(InputError, match="temperature 1"):
        top.entropy(2.0)


@pytest.mark.parametrize("signal", signals(), ids=lambda signal: type(signal).__name__)
def test_every_signal_satisfies_the_protocol(signal: TeacherSignal) -> None:
    assert isinstance(signal, TeacherSignal)
    assert len(signal) == 5
    assert len(signal.take(slice(1, 4)).materialized()) == 3
    assert signal.entropy(1.0).shape == (5,)
    if signal.vocab is None:
        with pytest.raises(InputError, match="not recorded"):
            signal.linear_outputs(None)
        with pytest.raises(InputError, match="probability of every token"):
            signal.log_probs_of(torch.zeros(5, dtype=torch.long))
        assert signal.outside_mass(torch.zeros(5, 1, dtype=torch.long), 1.0, None) is None
    else:
        assert signal.vocab == VOCAB
        assert signal.linear_outputs(None).logits().shape == (5, VOCAB)
        assert (signal.log_probs_of(torch.zeros(5, dtype=torch.long)) < 0).all()


def test_agreement_is_known_where_the_most_likely_token_of_the_teacher_is() -> None:
    """The teacher prefers token 3, which the student does not propose: among the candidates both prefer token 0."""
    student, teacher = torch.tensor([[3.0, 2.0, 1.0, 0.0]]), torch.tensor([[2.0, 1.0, 0.0, 3.0]])
    ranks = TeacherRanks(torch.ones(1), torch.tensor([[0, 1]]), torch.tensor([[0, 1]]))
    top = TeacherTopK(ranks, torch.tensor([[3]]), teacher.log_softmax(-1)[:, 3:])
    assert ranks.top1_agreement(student) is None
    assert TeacherTokens(torch.tensor([0])).top1_agreement(student) is None
    assert top.top1_agreement(student) == TeacherLogits(teacher).top1_agreement(student) == 0


def test_hidden_states_and_logits_give_the_same_results() -> None:
    hidden, logits, *_ = signals()
    student, ids = torch.randn(5, VOCAB, generator=torch.Generator().manual_seed(1)), torch.arange(5)
    log_q, top, log_sum = student.log_softmax(-1), student.topk(4).indices, (logits.logits / 2).logsumexp(-1)
    for one, other in (
        (hidden.entropy(2.0), logits.entropy(2.0)),
        (hidden.top1_agreement(student), logits.top1_agreement(student)),
        (hidden.ranked_candidates(student, 4), logits.ranked_candidates(student, 4)),
        (hidden.divergence(log_q, Divergence.jsd(0.5), 1.0), logits.divergence(log_q, Divergence.jsd(0.5), 1.0)),
        (hidden.log_probs_of(ids), logits.log_probs_of(ids)),
        (hidden.outside_mass(top, 2.0, None), logits.outside_mass(top, 2.0, None)),
        (hidden.outside_mass(top, 2.0, log_sum), logits.outside_mass(top, 2.0, None)),
        (logits.outside_mass(top, 2.0, log_sum), logits.outside_mass(top, 2.0, None)),
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kept", [slice(0, 7), slice(2, 3), torch.tensor([6, 0, 3])])
def test_each_token_has_the_values_of_its_own_teacher(kept: slice | torch.Tensor) -> None:
    """The teachers differ in width, scale, soft-cap and precision; one has no token."""
    generator = torch.Generator().manual_seed(2)
    heads = [
        Head(
            torch.randn(VOCAB + 3, width, generator=generator).to(dtype),
            vocab_size=VOCAB,
            logit_scale=scale,
            softcap=cap,
        )
        for width, dtype, scale, cap in (
            (3, torch.float32, 1.0, None),
            (5, torch.bfloat16, 0.5, 2.0),
            (4, torch.float32, 1.0, None),
        )
    ]
    owners = torch.tensor([1, 0, 1, 0, 0, 1, 1])
    teachers = [
        TeacherHidden(torch.randn(int((owners == i).sum()), head.weight.shape[1], generator=generator), head)
        for i, head in enumerate(heads)
    ]
    logits = torch.empty(7, VOCAB)
    for i, teacher in enumerate(teachers):
        logits[owners == i] = teacher.materialized().logits.float()
    signal, expected = SeveralTeachers.of(teachers, owners).take(kept), TeacherLogits(logits[kept])
    student = torch.randn(len(signal), VOCAB, generator=generator)
    log_q, top, ids = student.log_softmax(-1), student.topk(4).indices, student.argmin(-1)
    log_sum = (expected.logits / 2).logsumexp(-1)
    assert (len(signal), signal.vocab, signal.width) == (len(expected), VOCAB, 5)
    buffer = torch.full((7, VOCAB), torch.nan)
    for one, other in (
        (signal.linear_outputs(None).logits(), expected.logits),
        (signal.linear_outputs(buffer).logits(), expected.logits),
        (signal.entropy(2.0), expected.entropy(2.0)),
        (signal.top1_agreement(student), expected.top1_agreement(student)),
        (signal.ranked_candidates(student, 4), expected.ranked_candidates(student, 4)),
        (signal.divergence(log_q, Divergence.jsd(0.5), 1.0), expected.divergence(log_q, Divergence.jsd(0.5), 1.0)),
        (signal.log_probs_of(ids), expected.log_probs_of(ids)),
        (signal.outside_mass(top, 2.0, None), expected.outside_mass(top, 2.0, None)),
        (signal.outside_mass(top, 2.0, log_sum), expected.outside_mass(top, 2.0, None)),
    ):
        torch.testing.assert_close(one, other)


def teacher_and_student(sharpness: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a teacher and of a similar student."""
    generator = torch.Generator().manual_seed(0)
    p = sharpness * torch.randn(TOKENS, VOCAB, generator=generator, dtype=torch.float64)
    return p, p + torch.randn(TOKENS, VOCAB, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("k", [1, 8, 40])
@pytest.mark.parametrize("sharpness", [0.3, 3.0])
def test_the_bucket_loses_at_most_the_bound_of_the_tails(beta: float, k: int, sharpness: float) -> None:
    """docs/artifacts.md: with w = beta p / m, m = beta p + (1 - beta) q, the loss is between 0 and m h(w) <= m ln 2."""
    p, q = teacher_and_student(sharpness)
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    top = log_p.topk(k)
    ranks = TeacherRanks(torch.zeros(TOKENS), top.indices[:, :1], torch.zeros(TOKENS, 1, dtype=torch.long))
    recorded = TeacherTopK(ranks, top.indices, top.values).divergence(log_q, Divergence.jsd(beta), 1.0)
    lost = generalized_jsd(q, p, beta) - recorded
    p_tail = 1 - top.values.exp().sum(-1)
    q_tail = 1 - log_q.gather(-1, top.indices).exp().sum(-1)
    m = beta * p_tail + (1 - beta) * q_tail
    w = beta * p_tail / m
    bound = m * (-w * w.log() - (1 - w) * (1 - w).log())
    assert (lost >= -1e-9).all()
    assert (lost <= bound + 1e-9).all()
    assert (bound <= m * math.log(2) + 1e-12).all()
    assert lost.max() > 1e-4


def test_the_bound_is_reached_by_tails_that_share_no_token() -> None:
    """Teacher (1/2, 1/2, 0), student (1/2, 0, 1/2), one token recorded: the whole divergence is lost, h(beta) / 2."""
    p, q = torch.tensor([[0.5, 0.5, 0.0]]).log(), torch.tensor([[0.5, 0.0, 0.5]]).log()
    beta = 0.9
    ranks = TeacherRanks(torch.zeros(1), torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 1, dtype=torch.long))
    recorded = TeacherTopK(ranks, torch.tensor([[0]]), p[:, :1]).divergence(q, Divergence.jsd(beta), 1.0)
    assert float(recorded) == pytest.approx(0, abs=1e-6)
    exact = generalized_jsd(q.clamp(min=-50), p.clamp(min=-50), beta)
    assert float(exact) == pytest.approx(0.5 * -(0.9 * math.log(0.9) + 0.1 * math.log(0.1)))


@pytest.mark.parametrize("vocab", [1, 5, 127, 128, 129, 300, 1024])
def test_the_most_likely_token_is_the_first_of_equals(vocab: int) -> None:
    """Anywhere in the vocabulary, also at the end of a block; ties are frequent."""
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randint(-60, 60, (200, vocab), generator=generator).float()
    assert torch.equal(argmax(logits), logits.argmax(-1))
    assert torch.equal(argmax(torch.eye(vocab)), torch.arange(vocab))
