"""Recorded top-K: what merging the rest into one bucket can lose, and no more; the likeliest token."""

import math

import pytest
import torch

from tsdkd.core import Divergence, TeacherRanks, TeacherTopK, generalized_jsd, teacher_signals

TOKENS, VOCAB = 200, 60


def both(sharpness: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a teacher and of a student that resembles it."""
    generator = torch.Generator().manual_seed(0)
    p = sharpness * torch.randn(TOKENS, VOCAB, generator=generator, dtype=torch.float64)
    return p, p + torch.randn(TOKENS, VOCAB, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("k", [1, 8, 40])
@pytest.mark.parametrize("sharpness", [0.3, 3.0])
def test_the_bucket_loses_at_most_what_the_tails_weigh(beta: float, k: int, sharpness: float) -> None:
    """docs/artifacts.md: with w = beta p / m, m = beta p + (1 - beta) q, the loss is between 0 and m h(w) <= m ln 2."""
    p, q = both(sharpness)
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
    assert lost.max() > 1e-4  # it does lose something


def test_the_bound_is_reached_by_tails_that_share_no_token() -> None:
    """Teacher (1/2, 1/2, 0), student (1/2, 0, 1/2), one token kept: what is lost is all there is, h(beta) / 2."""
    p, q = torch.tensor([[0.5, 0.5, 0.0]]).log(), torch.tensor([[0.5, 0.0, 0.5]]).log()
    beta = 0.9
    ranks = TeacherRanks(torch.zeros(1), torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 1, dtype=torch.long))
    kept = TeacherTopK(ranks, torch.tensor([[0]]), p[:, :1]).divergence(q, Divergence.jsd(beta), 1.0)
    assert float(kept) == pytest.approx(0, abs=1e-6)
    exact = generalized_jsd(q.clamp(min=-50), p.clamp(min=-50), beta)
    assert float(exact) == pytest.approx(0.5 * -(0.9 * math.log(0.9) + 0.1 * math.log(0.1)))


@pytest.mark.parametrize("vocab", [1, 5, 127, 128, 129, 300, 1024])
def test_the_likeliest_token_is_the_first_of_equals(vocab: int) -> None:
    """Anywhere in the vocabulary, at the end of a stretch of it too; ties are frequent here."""
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randint(-60, 60, (200, vocab), generator=generator).float()
    assert torch.equal(teacher_signals._argmax(logits), logits.argmax(-1))
    assert torch.equal(teacher_signals._argmax(torch.eye(vocab)), torch.arange(vocab))
