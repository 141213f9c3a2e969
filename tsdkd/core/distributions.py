"""Entropy and divergence of next-token distributions, per position; half precision is computed in float32."""

import math

import torch
from torch import Tensor

from tsdkd.core.losses import Divergence, Temperature


def log_probs(logits: Tensor, temperature: Temperature = 1.0) -> Tensor:
    """Log-softmax of `logits / temperature` (..., vocab), in float32 or better."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return (wide / temperature).log_softmax(-1)


def entropy_of(log_p: Tensor) -> Tensor:
    """Entropy, in nats, of log-probabilities (..., vocab) -> (...)."""
    return -(log_p.exp() * log_p).sum(-1)


def divergence_of(log_p: Tensor, log_q: Tensor, formula: Divergence) -> Tensor:
    """The divergence `formula`, in nats, of teacher and student log-probabilities (..., n) -> (...)."""
    weighted = ((formula.teacher_weight, log_p), (formula.student_weight, log_q))
    log_m = log_mixture(log_p, log_q, formula.mix)
    return torch.stack([weight * _kl(log_side, log_m) for weight, log_side in weighted if weight]).sum(0)


def entropy(logits: Tensor) -> Tensor:
    """Entropy over the full vocabulary, eq. (10): logits (..., vocab) -> nats (...)."""
    return entropy_of(log_probs(logits))


def generalized_jsd(student_logits: Tensor, teacher_logits: Tensor, beta: float) -> Tensor:
    """Generalised Jensen-Shannon divergence, eq. (1): logits (..., vocab) -> nats (...).

    `JSD(P || Q) = beta KL(P || M) + (1 - beta) KL(Q || M)`, `M = beta P + (1 - beta) Q`, P the teacher, Q the student.
    The formula is 0 at beta = 0 and 1; as in GKD (Agarwal et al. 2024), these are the limits of JSD / beta and
    JSD / (1 - beta): forward KL(P || Q) at 0, reverse KL(Q || P) at 1.
    """
    return divergence_of(log_probs(teacher_logits), log_probs(student_logits), Divergence.jsd(beta))


def log_mixture(log_p: Tensor, log_q: Tensor, mix: float) -> Tensor:
    """Logarithm of `mix p + (1 - mix) q`, of log-probabilities of one shape."""
    if mix in {0, 1}:
        return log_p if mix else log_q
    return torch.logaddexp(log_p + math.log(mix), log_q + math.log1p(-mix))


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return (log_a.exp() * (log_a - log_b)).sum(-1)
