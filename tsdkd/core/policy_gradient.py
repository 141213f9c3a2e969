"""MiniLLM's policy gradient of the reverse KL (Gu et al. 2024): a fourth term, which TSD-KD does not have.

`sum_t w_t [KL_t - R_t+1 grad log q(y_t)]`: the divergence at a token, and the token's effect on later tokens.
"""

from dataclasses import dataclass

from torch import Tensor

from tsdkd.core.config import TSDKDConfig
from tsdkd.core.distributions import log_mixture
from tsdkd.errors import InputError


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """Response tokens, sampled from `a p + (1 - a) q_then`: a the teacher fraction, q_then the student at sampling."""

    ids: Tensor
    """(tokens,)"""
    teacher_fraction: float = 0.0
    log_probs: Tensor | None = None
    """Log-probabilities of `ids` under q_then, (tokens,); None: the student has not changed since."""

    def take(self, tokens: slice) -> "SampledTokens":
        """Some of the tokens."""
        log_probs = None if self.log_probs is None else self.log_probs[tokens]
        return SampledTokens(self.ids[tokens], self.teacher_fraction, log_probs)

    def gather(self, values: Tensor) -> Tensor:
        """The values at `ids`: (tokens, vocab) -> (tokens,)."""
        return values.gather(-1, self.ids.unsqueeze(-1)).squeeze(-1)


def require_sampled(sampled: SampledTokens | None, config: TSDKDConfig) -> SampledTokens | None:
    """`sampled` for a config with a policy gradient, else None.

    Raises InputError when the policy gradient has a weight and `sampled` is None.
    """
    if not config.policy_gradient_weight:
        return None
    if sampled is None:
        raise InputError(
            "The policy gradient needs the tokens with their sampling probabilities.", "Pass SampledTokens."
        )
    return sampled


def importance_and_rewards(
    student_log_probs: Tensor, teacher_log_probs: Tensor, sampled: SampledTokens
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the sampled tokens -> importance weights and rewards, all (tokens,).

    The weight is `w_t = q(y_t) / (a p(y_t) + (1 - a) q_then(y_t))`, with a gradient through q alone; the reward is
    `log p(y_t) / q(y_t)`, without a gradient.
    """
    log_q_then = student_log_probs.detach() if sampled.log_probs is None else sampled.log_probs.to(student_log_probs)
    log_sampling = log_mixture(teacher_log_probs, log_q_then, sampled.teacher_fraction)
    return (student_log_probs - log_sampling).exp(), (teacher_log_probs - student_log_probs).detach()


def mean_future_rewards(rewards: Tensor, response_mask: Tensor) -> Tensor:
    """Mean reward of the later tokens of a response, 0 at its last: (batch, seq), undefined off the response."""
    wide = rewards.double()
    later_tokens = response_mask.flip(-1).cumsum(-1).flip(-1) - 1
    later_sum = wide.flip(-1).cumsum(-1).flip(-1) - wide
    return (later_sum / later_tokens.clamp(min=1)).to(rewards)
