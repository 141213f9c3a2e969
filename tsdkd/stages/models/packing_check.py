"""Whether a model reads packed batches: recurrent layers, for example, carry one sequence over to the next."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from tsdkd.errors import first_line
from tsdkd.stages.models.attention import PROBE_TOKENS, TOLERANCE, difference_from_eager
from tsdkd.stages.models.packed_attention import PACKED, has_packed_kernels, packed_sequences

LENGTHS = [7, 4, 9]
"""Of the sequences that are compared."""
MIXED_TOLERANCE = 1e-4
"""Relative change of hidden states by another sequence of the batch; or the rounding of experts' batches."""
POSITION_TOLERANCE = 1e-3
"""Relative difference from hidden states of padded sequences; or the rounding of 16-bit kernels."""


def find_packing_problem(
    model: PreTrainedModel, decoder: PreTrainedConfig, device: torch.device, read: Callable[[Any, Any, Any], Tensor]
) -> str | None:
    """Why the model cannot read packed batches, as a predicate of its name; None: it can.

    `decoder`: the config of the part that computes hidden states. `read`: `LanguageModel.hidden`.
    """
    if getattr(model.config.get_text_config(), "attn_temperature_tuning", False):  # has no effect in a short batch
        return "scales attention by a token's place in the batch"
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            if not has_packed_kernels(decoder):
                with packed_sequences(decoder, [PROBE_TOKENS], device):
                    if difference_from_eager(model, PACKED) > TOLERANCE:
                        return "computes another attention in packed batches"
            return _compare(read, device, 2 * torch.finfo(model.dtype).eps)
    except Exception as error:  # models use masks and arguments in many ways
        return f"does not read packed batches ({first_line(error)})"


def _compare(read: Callable[[Any, Any, Any], Tensor], device: torch.device, rounding: float) -> str | None:
    """Compares packed sequences with padded ones, and with the same sequences around another one."""
    positions = torch.arange(max(LENGTHS), device=device).expand(len(LENGTHS), -1)
    mask = positions < torch.tensor(LENGTHS, device=device).unsqueeze(-1)
    ids = torch.arange(mask.numel(), device=device).view_as(mask)

    def packed(ids: Tensor) -> tuple[Tensor, ...]:
        hidden = read(ids[mask].unsqueeze(0), None, positions[mask].unsqueeze(0))[0]
        return torch.split(hidden.float(), LENGTHS)

    own, changed = packed(ids), packed(ids + torch.tensor([[0], [1], [0]], device=device))
    padded = read(ids, mask.long(), None).float()
    if any(_difference(changed[i], own[i]) > max(rounding, MIXED_TOLERANCE) for i in (0, 2)):
        return "mixes the sequences of a packed batch"
    tolerance = max(8 * rounding, POSITION_TOLERANCE)
    if any(_difference(row[: len(found)], found) > tolerance for row, found in zip(padded, own, strict=True)):
        return "ignores the positions of a packed batch"
    return None


def _difference(value: Tensor, expected: Tensor) -> float:
    """The norm of the difference, in units of the expected value's norm."""
    return float((value - expected).norm() / expected.norm())
