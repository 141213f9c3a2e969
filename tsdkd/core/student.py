"""The student's response tokens and output head without autograd: logits forward, gradients of both backward."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tsdkd.core.head import Head

BUFFERS = 5
SLAB = 2**26
"""Numbers of a product that are formed at a time where its sum is of another precision."""


class StudentLogits:
    """Hidden states (tokens, width) and the head that reads them; gradients of the linear layer gather here.

    Matrix products run in `precision`, sums are kept in float32 or better.
    """

    def __init__(self, hidden: Tensor, head: Head, precision: torch.dtype, wanted: list[bool]) -> None:
        self.hidden = hidden.to(precision)
        self.head = head.cut.to(precision)
        self.wide = torch.promote_types(precision, torch.float32)
        self._parts = differentiable_parts(hidden, head)
        self._sums = [
            torch.zeros_like(part, dtype=torch.promote_types(part.dtype, torch.float32))
            if want and part is not None
            else None
            for part, want in zip(self._parts, wanted, strict=True)
        ]
        self._room: Tensor | None = None
        self._places: Tensor | None = None

    @property
    def vocab(self) -> int:
        return len(self.head.weight)

    @property
    def learns(self) -> bool:
        return any(total is not None for total in self._sums)

    @property
    def gradients(self) -> list[Tensor | None]:
        """Of hidden states, weight and bias, in their dtypes."""
        pairs = zip(self._sums, self._parts, strict=True)
        return [None if total is None or part is None else total.to(part.dtype) for total, part in pairs]

    def linear(self, rows: Tensor | slice) -> Tensor:
        """What the linear layer says of some tokens: (n, vocab), valid until the next call."""
        hidden = self.hidden[rows]
        if self._room is None or len(self._room) < len(hidden):
            self._room = hidden.new_empty(len(hidden), self.vocab)
        return self.head.linear(hidden, out=self._room[: len(hidden)])

    def places(self, tokens: int, most: int) -> tuple[Tensor, ...]:
        """`PLACES` of them (tokens, vocab), valid until the next call: fresh memory for each block would cost more.

        `most`: the largest number of tokens that is ever asked for.
        """
        if self._places is None:
            self._places = self.hidden.new_empty(BUFFERS, most, self.vocab, dtype=self.wide)
        return tuple(self._places[:, :tokens])

    def pull(self, rows: Tensor | slice, slopes: Tensor, weights: Tensor) -> None:
        """Add what slopes (n, vocab) mean further down, each token's times its weight (n,).

        They are gradients at the logits before a soft-cap: `logit_scale` times the linear layer's outputs.
        """
        hidden_sum, weight_sum, bias_sum = self._sums
        weights = self.head.logit_scale * weights
        each = weights.unsqueeze(-1)
        if hidden_sum is not None:
            hidden_sum[rows] += (slopes @ self.head.weight) * each
        if weight_sum is not None:
            _add_product(weight_sum[: self.vocab], slopes.T, (self.hidden[rows] * each).to(slopes))
        if bias_sum is not None:
            _add_product(bias_sum[: self.vocab].unsqueeze(-1), slopes.T, each.to(slopes))

    def pull_at(self, rows: Tensor, ids: Tensor, slopes: Tensor) -> None:
        """As `pull`, for weighted slopes (n, k) at few `ids` (n, k)."""
        hidden_sum, weight_sum, bias_sum = self._sums
        slopes = self.head.logit_scale * slopes
        if hidden_sum is not None:
            hidden_sum[rows] += torch.einsum("nk,nkd->nd", slopes, self.head.weight[ids].to(slopes))
        if weight_sum is not None:
            outer = slopes.unsqueeze(-1) * self.hidden[rows].to(slopes).unsqueeze(1)
            weight_sum.index_add_(0, ids.flatten(), outer.flatten(0, 1).to(weight_sum))
        if bias_sum is not None:
            bias_sum.index_add_(0, ids.flatten(), slopes.flatten().to(bias_sum))


def differentiable_parts(hidden: Tensor, head: Head) -> tuple[Tensor, Tensor, Tensor | None]:
    """What can receive gradients."""
    return hidden, head.weight, head.bias


def _add_product(into: Tensor, a: Tensor, b: Tensor) -> None:
    if a.dtype == into.dtype:
        into.addmm_(a, b)
        return
    step = max(1, SLAB // b.shape[1])
    for some, rows in zip(into.split(step), a.split(step), strict=True):
        some.add_(rows @ b)


class WithPrecomputedGradients(torch.autograd.Function):
    """A value whose gradients were computed along with it."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor | None], *_: Tensor | None) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Any:
        if ctx.gradients is None:
            raise RuntimeError("The chunked loss gives its gradients away: it can be differentiated once.")
        gradients, ctx.gradients = ctx.gradients, None
        return None, None, *(None if gradient is None else gradient.mul_(upstream) for gradient in gradients)
