"""The student's logits without autograd: formed and differentiated for some tokens at a time."""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tsdkd.core.gradients import BlockBuffers
from tsdkd.core.lm_head import Head, LinearOutputs

MAX_PRODUCT_ELEMENTS = 2**26
"""Elements of the largest product that is formed in one precision and added to a sum in another."""


class StudentLogits:
    """Hidden states (tokens, width) and their head; accumulates the gradients of both and of the bias.

    Matrix products run in `precision`; sums are in float32 or better.
    """

    def __init__(self, hidden: Tensor, head: Head, precision: torch.dtype, requires_grad: list[bool]) -> None:
        """`requires_grad`: which of `differentiable_tensors(hidden, head)` receive a gradient."""
        self.hidden = hidden.to(precision)
        self.head = head.aligned.to(precision)
        self.vocab, self.columns = self.head.vocab, len(self.head.weight)
        self.wide = torch.promote_types(precision, torch.float32)
        self._tensors = differentiable_tensors(hidden, head)
        rows = len(hidden), *(max(len(head.weight), self.columns),) * 2
        self._sums = [
            tensor.new_zeros(count, *tensor.shape[1:], dtype=torch.promote_types(tensor.dtype, torch.float32))
            if required and tensor is not None
            else None
            for tensor, required, count in zip(self._tensors, requires_grad, rows, strict=True)
        ]
        self._hidden_grad_norms: defaultdict[str, list[Tensor]] = defaultdict(list)
        self._linear_buffer: Tensor | None = None
        self._block_buffers: Tensor | None = None

    @property
    def requires_grad(self) -> bool:
        """Whether any tensor receives a gradient."""
        return any(total is not None for total in self._sums)

    @property
    def gradients(self) -> list[Tensor | None]:
        """Of hidden states, weight and bias, in their dtypes; None for a tensor that receives none."""
        pairs = zip(self._sums, self._tensors, strict=True)
        return [
            None if total is None or tensor is None else total[: len(tensor)].to(tensor.dtype)
            for total, tensor in pairs
        ]

    def grad_norm(self, term: str) -> Tensor | None:
        """The norm of the gradient that a term has accumulated at the hidden states; None if they receive none."""
        hidden_sum, norms = self._sums[0], self._hidden_grad_norms[term]
        if hidden_sum is None:
            return None
        return torch.linalg.vector_norm(torch.stack(norms)) if norms else hidden_sum.new_zeros(())

    def linear(self, tokens: Tensor | slice) -> LinearOutputs:
        """The head's linear outputs for some tokens, valid until the next call."""
        hidden = self.hidden[tokens]
        if self._linear_buffer is None or len(self._linear_buffer) < len(hidden):
            self._linear_buffer = hidden.new_empty(len(hidden), self.columns)
        return self.head.linear(hidden, out=self._linear_buffer[: len(hidden)])

    def buffers(self, tokens: int, largest: int) -> BlockBuffers:
        """Buffers (tokens, vocab), valid until the next call: new memory for each block would cost more time.

        `largest`: the largest `tokens` of any call.
        """
        if self._block_buffers is None:
            count = len(BlockBuffers._fields)
            self._block_buffers = self.hidden.new_empty(count, largest, self.vocab, dtype=self.wide)
        return BlockBuffers(*self._block_buffers[:, :tokens])

    def accumulate(self, term: str, tokens: Tensor | slice, grads: Tensor, weights: Tensor) -> None:
        """Add the gradients of hidden states, weight and bias from `grads` (n, columns) times `weights` (n,).

        `grads` are gradients of `term` at `logit_scale` times the linear outputs, before a soft-cap; those at the
        columns of padding rows become 0. Each call of a term has other tokens.
        """
        hidden_sum, weight_sum, bias_sum = self._sums
        grads[:, self.vocab :] = 0
        column = (self.head.logit_scale * weights).unsqueeze(-1)
        if hidden_sum is not None:
            hidden_sum[tokens] += self._record_norm(term, (grads @ self.head.weight) * column)
        if weight_sum is not None:
            _add_product(weight_sum[: self.columns], grads.T, (self.hidden[tokens] * column).to(grads))
        if bias_sum is not None:
            _add_product(bias_sum[: self.columns].unsqueeze(-1), grads.T, column.to(grads))

    def accumulate_at(self, term: str, tokens: Tensor, ids: Tensor, grads: Tensor) -> None:
        """As `accumulate`, for weighted gradients (n, k) at the logits of `ids` (n, k) alone."""
        hidden_sum, weight_sum, bias_sum = self._sums
        grads = self.head.logit_scale * grads
        if hidden_sum is not None:
            hidden_grads = torch.einsum("nk,nkd->nd", grads, self.head.weight[ids].to(grads))
            hidden_sum[tokens] += self._record_norm(term, hidden_grads)
        if weight_sum is not None:
            outer = grads.unsqueeze(-1) * self.hidden[tokens].to(grads).unsqueeze(1)
            weight_sum.index_add_(0, ids.flatten(), outer.flatten(0, 1).to(weight_sum))
        if bias_sum is not None:
            bias_sum.index_add_(0, ids.flatten(), grads.flatten().to(bias_sum))

    def _record_norm(self, term: str, hidden_grads: Tensor) -> Tensor:
        self._hidden_grad_norms[term].append(torch.linalg.vector_norm(hidden_grads))
        return hidden_grads


def differentiable_tensors(hidden: Tensor, head: Head) -> tuple[Tensor, Tensor, Tensor | None]:
    """The tensors that can receive gradients: hidden states, weight and bias."""
    return hidden, head.weight, head.bias


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add `a @ b` to `total`, whose precision may be higher than that of the factors."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
        return
    if a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
        return
    step = max(1, MAX_PRODUCT_ELEMENTS // b.shape[1])
    for total_rows, a_rows in zip(total.split(step), a.split(step), strict=True):
        total_rows.add_(a_rows @ b)


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
            raise RuntimeError("The chunked loss frees its gradients in the backward: it can be differentiated once.")
        gradients, ctx.gradients = ctx.gradients, None
        return None, None, *(None if gradient is None else gradient.mul_(upstream) for gradient in gradients)
