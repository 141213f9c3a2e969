"""Selection: entropies and masks become one weight per token and term."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tsdkd.core.config import ROUNDING, TSDKDConfig
from tsdkd.errors import InputError

OpenerFraction = Tensor | Callable[[Tensor, Tensor, Tensor], Tensor]
"""A fraction c for each response (batch,), or a function that gives it, such as `AdaptiveOpener().fraction`."""


@dataclass(frozen=True, slots=True)
class TokenWeights:
    """One weight per token and term, (batch, seq) each; 0 where a token does not count. No gradient.

    A response's weighted sum is its term: the weights contain the means' 1/L, 1/|I| and 1/m.
    """

    indirect: Tensor
    direct: Tensor
    entropy: Tensor
    gate: Tensor
    """sigma_tau before any normalisation, 1 everywhere when the gate is off."""


def select(
    student_entropy: Tensor,
    teacher_entropy: Tensor,
    response_mask: Tensor,
    config: TSDKDConfig,
    opener_fraction: OpenerFraction | None = None,
) -> TokenWeights:
    """The weights of all three terms from both models' entropies and the response mask, all (batch, seq).

    Args:
        opener_fraction: replaces `config.opener`; required when that is "adaptive".

    Raises:
        InputError: a row without a response token; an opener fraction that is missing, or given for a released opener.
    """
    check_rows(response_mask)
    indirect, entropy = select_tokens(student_entropy, teacher_entropy, response_mask, config, opener_fraction)
    inverse_length = mean_weights(response_mask).to(student_entropy)
    direct, gate = gated_weights(student_entropy, teacher_entropy, inverse_length, config)
    return TokenWeights(indirect, direct, entropy, gate)


def select_tokens(
    student_entropy: Tensor,
    teacher_entropy: Tensor,
    response_mask: Tensor,
    config: TSDKDConfig,
    opener_fraction: OpenerFraction | None,
) -> tuple[Tensor, Tensor]:
    """The weights of the indirect and the entropy term, as `select`: they need the entropies of whole responses."""
    if opener_fraction is None and config.opener == "adaptive":
        raise InputError("opener='adaptive' needs a fraction for each response.", "Pass AdaptiveOpener().fraction.")
    if opener_fraction is not None and "opener" in config.released:
        raise InputError("The released opener is one for all responses.", "Pass no fractions.")
    fraction = float(config.opener) if opener_fraction is None else opener_fraction
    mask_opener, opener_mean = (
        (released_opener_mask, batch_mean_weights) if "opener" in config.released else (opener_mask, mean_weights)
    )
    mask_uncertain, uncertain_mean = (
        (released_entropy_mask, batch_mean_weights)
        if "entropy" in config.released
        else (top_entropy_mask, mean_weights)
    )
    with torch.no_grad():
        if callable(fraction):
            fraction = fraction(student_entropy, teacher_entropy, response_mask)
        opener = mask_opener(student_entropy, response_mask, fraction)
        uncertain = mask_uncertain(student_entropy, response_mask, config.em_ratio)
        indirect = opener if config.indirect_reduction == "sum" else opener_mean(opener)
        return indirect.to(student_entropy), uncertain_mean(uncertain).to(student_entropy)


def gated_weights(
    student_entropy: Tensor, teacher_entropy: Tensor, inverse_length: Tensor, config: TSDKDConfig
) -> tuple[Tensor, Tensor]:
    """The weight and the gate of the direct term, of one shape; they follow from a token's two entropies.

    `inverse_length`: 1/L of the token's response, 0 off the response.
    """
    if config.gate:
        gate = uncertainty_gate(student_entropy, teacher_entropy, config.tau)
    else:
        gate = torch.ones_like(student_entropy)
    return inverse_length * gate, gate


def mean_weights(mask: Tensor) -> Tensor:
    """1/n at each of a row's n True positions, 0 elsewhere: bool (batch, seq) -> float64 (batch, seq)."""
    return mask.double() / mask.sum(-1, keepdim=True).clamp(min=1)


def batch_mean_weights(mask: Tensor) -> Tensor:
    """batch/n at each of the batch's n True positions, 0 elsewhere: the mean over rows is a mean over all positions."""
    return mask.double() * len(mask) / mask.sum().clamp(min=1)


def opener_mask(student_entropy: Tensor, response_mask: Tensor, fraction: float | Tensor) -> Tensor:
    """The opener of each response (Sec. 3.1): (batch, seq) -> bool (batch, seq).

    The opener ends, inclusively, at the first position where the cumulated entropy reaches `fraction` (a float or
    (batch,)) of the response's total. With fraction 1 it is the whole response, with any final tokens of entropy 0.
    """
    column = torch.as_tensor(fraction, dtype=torch.float64, device=student_entropy.device).reshape(-1, 1)
    cumulated = torch.where(response_mask, student_entropy.detach().double(), 0.0).cumsum(-1)
    reached = (cumulated >= column * cumulated[:, -1:] * (1 - ROUNDING)) & response_mask
    reached_before = (reached.cumsum(-1) - reached.long()) > 0
    return response_mask & (~reached_before | (column >= 1))


def top_entropy_mask(student_entropy: Tensor, response_mask: Tensor, ratio: float) -> Tensor:
    """The most uncertain positions of each response, the set I of eq. (12): (batch, seq) -> bool (batch, seq).

    Exactly `max(1, ceil(ratio * L))` of a response's L positions; ties go to the earlier position.
    """
    length = response_mask.sum(-1, keepdim=True).double()
    count = (length * ratio * (1 - ROUNDING)).ceil().clamp(min=1)
    return (response_ranks(student_entropy, response_mask) < count) & response_mask


def response_ranks(values: Tensor, response_mask: Tensor) -> Tensor:
    """The rank of each position by descending values, 0 first: (batch, seq) -> (batch, seq).

    Ties go to the earlier position; positions off the response come last.
    """
    order = values.detach().masked_fill(~response_mask, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    positions = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, positions)


def released_opener_mask(student_entropy: Tensor, response_mask: Tensor, fraction: float | Tensor) -> Tensor:
    """The released code's opener: (batch, seq) -> bool (batch, seq).

    One length for all responses: the number of tokens before the cumulated entropy of the batch, row after row,
    reaches `fraction` of its total. It is 0 when the first token reaches it.
    """
    entropies = student_entropy.detach()[response_mask].double()
    length = int((entropies.cumsum(0) < fraction * entropies.sum() * (1 - ROUNDING)).sum())
    return response_mask & (response_mask.cumsum(-1) <= length)


def released_entropy_mask(student_entropy: Tensor, response_mask: Tensor, ratio: float) -> Tensor:
    """The released code's uncertain positions: (batch, seq) -> bool (batch, seq).

    Those whose entropy is at least the quantile `ratio` of the batch's entropies.
    """
    entropies = student_entropy.detach()[response_mask].double()
    return response_mask & (student_entropy >= entropies.quantile(ratio))


def uncertainty_gate(student_entropy: Tensor, teacher_entropy: Tensor, tau: float) -> Tensor:
    """sigma_tau(H(student) - H(teacher)), eq. (11): (...) -> (...), near 1 where only the student is uncertain.

    It carries no gradient.
    """
    return torch.sigmoid((student_entropy - teacher_entropy).detach() / tau)


def check_rows(response_mask: Tensor) -> None:
    """Raise InputError naming the first row of a (batch, seq) mask that has no response token."""
    empty = (~response_mask.any(-1)).nonzero()
    if len(empty):
        raise InputError(f"Row {int(empty[0])} has no response token.", "Drop empty responses before the loss.")
