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

    def to(self, target: torch.device | torch.dtype) -> "Head":
        return replace(self, weight=self.weight.to(target), bias=None if self.bias is None else self.bias.to(target))

    @property
    def cut(self) -> "Head":
        """The same head without its padding rows."""
        bias = None if self.bias is None else self.bias[: self.vocab_size]
        return replace(self, weight=self.weight[: self.vocab_size], bias=bias, vocab_size=None)

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., width) -> logits (..., vocab)."""
        head = self.cut
        return self.bend(torch.nn.functional.linear(hidden.to(head.weight.dtype), head.weight, head.bias))

    def linear(self, hidden: Tensor, out: Tensor) -> Tensor:
        """The linear layer alone, without gradient, into a given place: (tokens, width) -> (tokens, vocab)."""
        head = self.cut
        if head.bias is None:
            return torch.mm(hidden.to(head.weight.dtype), head.weight.T, out=out)
        return torch.addmm(head.bias, hidden.to(head.weight.dtype), head.weight.T, out=out)

    def logits_at(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Hidden states (tokens, width) and ids (tokens, k) -> their logits (tokens, k), in float32 or better."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        linear = torch.einsum("nd,nkd->nk", hidden.to(wide), self.weight[ids].to(wide))
        return self.bend(linear if self.bias is None else linear + self.bias[ids])

    def bend(self, linear: Tensor) -> Tensor:
        """What follows the linear layer, in float32 or better; `linear` itself where nothing follows."""
        if self.logit_scale == 1.0 and not self.softcap:
            return linear
        scaled = linear.to(torch.promote_types(linear.dtype, torch.float32)) * self.logit_scale
        return self.softcap * torch.tanh(scaled / self.softcap) if self.softcap else scaled

    def steepness(self, logits: Tensor) -> Tensor | None:
        """Derivative of the soft-cap where `bend` gave `logits`; None without one."""
        return 1 - (logits / self.softcap).square() if self.softcap else None
