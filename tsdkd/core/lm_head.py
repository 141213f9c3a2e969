"""The output head of a language model: from the hidden state after the last norm to logits."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

ROW_STEP = {"cpu": 1, "cuda": 64}
"""Matrix products of a head take multiples of so many rows: on a GPU, products of an odd number take several times as
long."""


@dataclass(frozen=True, slots=True)
class LinearOutputs:
    """Outputs `a` of a head's linear layer; its logits are `softcap * tanh(scale * a / softcap)`."""

    values: Tensor
    """(tokens, columns): the columns of the vocabulary, then those of padding rows."""
    logit_scale: float = 1.0
    softcap: float | None = None
    vocab: int | None = None
    """None: all columns."""

    @property
    def in_vocab(self) -> Tensor:
        """The values without the columns of padding rows: (tokens, vocab), a view."""
        return self.values[..., : self.vocab]

    def __len__(self) -> int:
        return len(self.values)

    def take(self, tokens: Tensor | slice) -> "LinearOutputs":
        """The outputs of some tokens: a mask or indices copy them, a slice does not."""
        return replace(self, values=self.values[tokens])

    def logits(self) -> Tensor:
        """(tokens, vocab), in float32 or better; `in_vocab` itself where the head has neither scale nor soft-cap."""
        values = self.in_vocab
        if self.logit_scale == 1.0 and not self.softcap:
            return values
        scaled = values.to(torch.promote_types(values.dtype, torch.float32)) * self.logit_scale
        return self.softcap * torch.tanh(scaled / self.softcap) if self.softcap else scaled

    def logits_of(self, ids: Tensor) -> Tensor:
        """The logits of ids (tokens,), one at each token: (tokens,)."""
        return replace(self, values=self.values.gather(-1, ids.unsqueeze(-1)).squeeze(-1), vocab=None).logits()

    def softcap_grad(self, logits: Tensor) -> Tensor | None:
        """The derivative of the soft-cap at `logits` (any shape); None without a soft-cap."""
        return 1 - (logits / self.softcap).square() if self.softcap else None


@dataclass(frozen=True, slots=True)
class Head:
    """A linear layer with the logit scale and soft-cap of its model: `softcap * tanh(scale * (W h + b) / softcap)`.

    `vocab_size` cuts off rows past the tokenizer's last id (padding rows), so that two models with the same tokenizer
    and different padding have the same vocabulary.
    """

    weight: Tensor
    """(rows, width)"""
    bias: Tensor | None = None
    """(rows,)"""
    logit_scale: float = 1.0
    softcap: float | None = None
    vocab_size: int | None = None

    @property
    def vocab(self) -> int:
        """Number of rows without padding rows."""
        return len(self.weight[: self.vocab_size])

    @property
    def aligned(self) -> "Head":
        """The same head with the fewest padding rows that `ROW_STEP` allows: its own, or zeros where it has too few."""
        vocab, step = self.vocab, ROW_STEP["cuda" if self.weight.is_cuda else "cpu"]
        rows = -(-vocab // step) * step
        weight = _with_rows(self.weight, rows)
        bias = None if self.bias is None else _with_rows(self.bias.unsqueeze(-1), rows).squeeze(-1)
        return replace(self, weight=weight, bias=bias, vocab_size=vocab)

    def to(self, target: torch.device | torch.dtype) -> "Head":
        """The same head on another device or in another dtype."""
        return replace(self, weight=self.weight.to(target), bias=None if self.bias is None else self.bias.to(target))

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., width) -> logits (..., vocab), differentiable."""
        head = self.aligned
        values = torch.nn.functional.linear(hidden.to(head.weight.dtype), head.weight, head.bias)
        return self._outputs(values, head.vocab).logits()

    def linear(self, hidden: Tensor, out: Tensor | None = None) -> LinearOutputs:
        """Hidden states (tokens, width) -> outputs of the linear layer, not differentiable.

        `out` (tokens, columns) receives the values; without it they get new memory.
        """
        head = self.aligned
        hidden = hidden.to(head.weight.dtype)
        if head.bias is None:
            return self._outputs(torch.mm(hidden, head.weight.T, out=out), head.vocab)
        return self._outputs(torch.addmm(head.bias, hidden, head.weight.T, out=out), head.vocab)

    def logits_at(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Hidden states (tokens, width) and ids (tokens, k) -> their logits (tokens, k), in float32 or better."""
        return self._outputs(self._linear_at(hidden, ids)).logits()

    def linear_at(self, hidden: Tensor, ids: Tensor) -> LinearOutputs:
        """The outputs of `linear` at the ids (tokens, k) only, rounded as `linear` rounds them; not differentiable."""
        return self._outputs(self._linear_at(hidden.to(self.weight.dtype), ids).to(self.weight.dtype))

    def _linear_at(self, hidden: Tensor, ids: Tensor) -> Tensor:
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        linear = torch.einsum("nd,nkd->nk", hidden.to(wide), self.weight[ids].to(wide))
        return linear if self.bias is None else linear + self.bias[ids]

    def _outputs(self, values: Tensor, vocab: int | None = None) -> LinearOutputs:
        return LinearOutputs(values, self.logit_scale, self.softcap, vocab)


def _with_rows(values: Tensor, rows: int) -> Tensor:
    """The first rows of (n, width), with rows of zeros where it has fewer."""
    missing = rows - len(values)
    return torch.nn.functional.pad(values, (0, 0, 0, missing)) if missing > 0 else values[:rows]
