"""Which tokens count, and how much: the one place where entropies and masks become per-token weights."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tsdkd.core.config import ROUNDING, TSDKDConfig
from tsdkd.errors import InputError

OpenerFraction = Tensor | Callable[[Tensor, Tensor, Tensor], Tensor]
"""A fraction c for each response (batch,), or what chooses it, such as `AdaptiveOpener().fraction`."""


@dataclass(frozen=True, slots=True)
class TokenWeights:
    """One weight per token and loss, (batch, seq) each; 0 where a token does not count. No gradient.

    A response's weighted sum is that response's term: the 1/L, 1/|I| and 1/m are already in them.
    """

    ranking: Tensor
    divergence: Tensor
    entropy: Tensor
    gate: Tensor
    """The gate sigma_tau before any normalisation, 1 everywhere when it is off; for the log."""


def select(
    student_entropy: Tensor,
    teacher_entropy: Tensor,
    response_mask: Tensor,
    config: TSDKDConfig,
    opener_fraction: OpenerFraction | None = None,
) -> TokenWeights:
    """The weights of TSD-KD from both models' entropies and the response mask, all (batch, seq).

    `opener_fraction` replaces `config.opener`; it is required when that is "adaptive".
    Raises InputError for a row without a response token.
    """
    check_rows(response_mask)
    if opener_fraction is None and config.opener == "adaptive":
        raise InputError("opener='adaptive' needs a fraction for each response.", "Pass AdaptiveOpener().fraction.")
    if opener_fraction is not None and "opener" in config.released:
        raise InputError("The released opener is one for all responses.", "Pass no fractions.")
    fraction = float(config.opener) if opener_fraction is None else opener_fraction
    opener_of, opener_mean = (
        (released_opener_mask, batch_shares) if "opener" in config.released else (opener_mask, shares)
    )
    uncertain_of, uncertain_mean = (
        (released_entropy_mask, batch_shares) if "entropy" in config.released else (top_entropy_mask, shares)
    )
    with torch.no_grad():
        if callable(fraction):
            fraction = fraction(student_entropy, teacher_entropy, response_mask)
        opener = opener_of(student_entropy, response_mask, fraction)
        uncertain = uncertain_of(student_entropy, response_mask, config.em_ratio)
        each = shares(response_mask).to(student_entropy)
        divergence, gate = divergence_weights(student_entropy, teacher_entropy, each, config)
        return TokenWeights(
            ranking=(opener if config.indirect_reduction == "sum" else opener_mean(opener)).to(gate),
            divergence=divergence,
            entropy=uncertain_mean(uncertain).to(gate),
            gate=gate,
        )


def divergence_weights(
    student_entropy: Tensor, teacher_entropy: Tensor, share: Tensor, config: TSDKDConfig
) -> tuple[Tensor, Tensor]:
    """Weight and gate of the divergence, all of one shape: they depend on a token's own two entropies alone.

    `share` is the 1/L of the token's response, 0 off the response.
    """
    gate = (
        uncertainty_gate(student_entropy, teacher_entropy, config.tau)
        if config.gate
        else torch.ones_like(student_entropy)
    )
    return share * gate, gate


def shares(mask: Tensor) -> Tensor:
    """1/n at each of the n True positions of a row, 0 elsewhere: bool (batch, seq) -> float64 (batch, seq)."""
    return mask.double() / mask.sum(-1, keepdim=True).clamp(min=1)


def batch_shares(mask: Tensor) -> Tensor:
    """batch/n at each of the n True positions: their mean over all responses at once, as the mean of `shares` is."""
    return mask.double() * len(mask) / mask.sum().clamp(min=1)


def opener_mask(student_entropy: Tensor, response_mask: Tensor, fraction: float | Tensor) -> Tensor:
    """The opener of each response (Sec. 3.1): (batch, seq) -> bool (batch, seq).

    The opener ends, inclusively, at the first position where the cumulated entropy reaches `fraction` (a float or
    (batch,)) of the response's total. A fraction of 1 is the whole response, trailing certain tokens included.
    """
    wanted = torch.as_tensor(fraction, dtype=torch.float64, device=student_entropy.device).reshape(-1, 1)
    cumulated = torch.where(response_mask, student_entropy.detach().double(), 0.0).cumsum(-1)
    reached = (cumulated >= wanted * cumulated[:, -1:] * (1 - ROUNDING)) & response_mask
    reached_before = (reached.cumsum(-1) - reached.long()) > 0
    return response_mask & (~reached_before | (wanted >= 1))


def top_entropy_mask(student_entropy: Tensor, response_mask: Tensor, ratio: float) -> Tensor:
    """The most uncertain positions of each response, the set I of eq. (12): (batch, seq) -> bool (batch, seq).

    Exactly `max(1, ceil(ratio * L))` of a response's L positions; of equals, the earlier.
    """
    length = response_mask.sum(-1, keepdim=True).double()
    count = (length * ratio * (1 - ROUNDING)).ceil().clamp(min=1)
    ranked = (
        student_entropy.detach().masked_fill(~response_mask, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    )
    place = torch.empty_like(ranked).scatter_(
        -1, ranked, torch.arange(ranked.shape[-1], device=ranked.device).expand_as(ranked)
    )
    return (place < count) & response_mask


def released_opener_mask(student_entropy: Tensor, response_mask: Tensor, fraction: float | Tensor) -> Tensor:
    """The released code's opener: (batch, seq) -> bool (batch, seq).

    The batch's entropies are strung together, row after row; as many as come before `fraction` of their total is
    reached, so many tokens are the opener of every response. None where the very first token reaches it.
    """
    strung = student_entropy.detach()[response_mask].double()
    length = int((strung.cumsum(0) < fraction * strung.sum() * (1 - ROUNDING)).sum())
    return response_mask & (response_mask.cumsum(-1) <= length)


def released_entropy_mask(student_entropy: Tensor, response_mask: Tensor, ratio: float) -> Tensor:
    """The released code's uncertain tokens: all but the batch's lowest `ratio`: (batch, seq) -> bool (batch, seq)."""
    strung = student_entropy.detach()[response_mask].double()
    return response_mask & (student_entropy >= strung.quantile(ratio))


def uncertainty_gate(student_entropy: Tensor, teacher_entropy: Tensor, tau: float) -> Tensor:
    """sigma_tau(H(student) - H(teacher)), eq. (11): near 1 where only the student is unsure. No gradient."""
    return torch.sigmoid((student_entropy - teacher_entropy).detach() / tau)


def check_rows(response_mask: Tensor) -> None:
    """Raise InputError naming the first row of a (batch, seq) mask that has no response token."""
    empty = (~response_mask.any(-1)).nonzero()
    if len(empty):
        raise InputError(f"Row {int(empty[0])} has no response token.", "Drop empty responses before the loss.")
