"""MiniLLM's policy gradient of the reverse KL (Gu et al. 2024): tokens as they were sampled, and what follows them.

`sum_t w_t [KL_t - R_t+1 grad log q(y_t)]`: beside the divergence at a token, what the token means for the later ones.
"""

from dataclasses import dataclass

from torch import Tensor

from tsdkd.core.distributions import log_mixture


@dataclass(frozen=True, slots=True)
class Sampled:
    """Response tokens, each sampled from `share p + (1 - share) q_then`."""

    ids: Tensor
    """(tokens,)"""
    teacher_fraction: float = 0.0
    log_probs: Tensor | None = None
    """Of these ids, (tokens,), by the student that sampled them; None: it has not changed since."""

    def take(self, tokens: slice) -> "Sampled":
        log_probs = None if self.log_probs is None else self.log_probs[tokens]
        return Sampled(self.ids[tokens], self.teacher_fraction, log_probs)

    def of(self, values: Tensor) -> Tensor:
        """Those of the tokens: (tokens, vocab) -> (tokens,)."""
        return values.gather(-1, self.ids.unsqueeze(-1)).squeeze(-1)


def importance_and_rewards(now: Tensor, teacher: Tensor, sampled: Sampled) -> tuple[Tensor, Tensor]:
    """Student's and teacher's log-probabilities of the tokens -> importance weights and rewards, all (tokens,).

    The weight is `w_t = q(y_t) / (share p(y_t) + (1 - share) q_then(y_t))`, with a gradient through q alone; the
    reward `log p(y_t) / q(y_t)`, without one.
    """
    then = now.detach() if sampled.log_probs is None else sampled.log_probs.to(now)
    return (now - log_mixture(teacher, then, sampled.teacher_fraction)).exp(), (teacher - now).detach()


def mean_future_rewards(rewards: Tensor, response_mask: Tensor) -> Tensor:
    """The mean reward of the tokens after each in its response, 0 at the last: (batch, seq), unknown elsewhere."""
    wide = rewards.double()
    after = response_mask.flip(-1).cumsum(-1).flip(-1) - 1
    sums = wide.flip(-1).cumsum(-1).flip(-1) - wide
    return (sums / after.clamp(min=1)).to(rewards)
