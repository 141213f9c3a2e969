"""The output head of a language model: from the hidden state after the last norm to logits."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Head:
    """A linear head with what models put after it: `softcap * tanh(scale * (W h + b) / softcap)`.

    `vocab_size` cuts rows past the tokenizer's last real id (padding rows), so that two models of one tokenizer but
    different padding speak about the same tokens.
    """

    weight: Tensor
    """(rows, width)"""
    bias: Tensor | None = None
    """(rows,)"""
    logit_scale: float = 1.0
    softcap: float | None = None
    vocab_size: int | None = None

    def to(self, device: torch.device) -> "Head":
        return replace(self, weight=self.weight.to(device), bias=None if self.bias is None else self.bias.to(device))

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., width) -> logits (..., vocab)."""
        bias = None if self.bias is None else self.bias[: self.vocab_size]
        logits = torch.nn.functional.linear(hidden.to(self.weight.dtype), self.weight[: self.vocab_size], bias)
        logits = logits * self.logit_scale if self.logit_scale != 1.0 else logits
        return self.softcap * torch.tanh(logits / self.softcap) if self.softcap else logits
