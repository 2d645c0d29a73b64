"""The one matrix product of the model, `y = x @ weight.T`, and its two gradients as functions of their own.

Every weight matrix outside the experts goes through `Linear`, so that one class can be put in its place: a quantised
one, one with a low-rank adapter, or one that defers its weight gradient (zero-bubble schedules call `weight_gradient`
later than `input_gradient`).

`pad_rows` rounds the number of rows up. On CPUs a row's bits depend on how many rows are multiplied with it; in
batch-invariant mode all products have a multiple of 8, where they do not (`Model.batch_invariant`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import kernels
from ..kernels.products import linear


def input_gradient(grad_y: Tensor, weight_OI: Tensor) -> Tensor:
    """[T, O] -> [T, I]."""
    return linear(grad_y, weight_OI.t())


def weight_gradient(grad_y: Tensor, x: Tensor) -> Tensor:
    """[T, O], [T, I] -> [O, I]."""
    return linear(grad_y.t(), x.t())


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight_OI)
        return linear(x, weight_OI)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight_OI = ctx.saved_tensors
        (grad_y,) = grads
        return (
            input_gradient(grad_y, weight_OI) if ctx.needs_input_grad[0] else None,
            weight_gradient(grad_y, x) if ctx.needs_input_grad[1] else None,
        )


def product(x: Tensor, weight_OI: Tensor, pad_rows: int = 1) -> Tensor:
    """`x @ weight.T` of [T, I] and [O, I]: [T, O], multiplied `pad_rows` rows at a time at least."""
    if torch.is_grad_enabled() and (x.requires_grad or weight_OI.requires_grad):
        y: Tensor = _Product.apply(x, weight_OI)
        return y
    if pad_rows == 1 and kernels.loops_for_few(x, weight_OI):
        return kernels.product(x, weight_OI)
    short = -x.shape[0] % pad_rows
    if short:
        return linear(F.pad(x, (0, 0, 0, short)), weight_OI)[: x.shape[0]]
    return linear(x, weight_OI)


class Linear(nn.Module):
    """A weight [out, in] without a bias. It is empty when made: `Model.reset_parameters` or a file fills it."""

    def __init__(self, in_size: int, out_size: int, *, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_size, in_size, dtype=dtype))
        self.pad_rows = 1

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weight, self.pad_rows)

    def whole(self) -> Tensor:
        """The matrix that this multiplies with, for whoever multiplies with parts of it (MLA, absorbed)."""
        return self.weight

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]} -> {self.weight.shape[0]}"


class GroupedLinear(Linear):
    """A block-diagonal one: each of G groups of numbers has its own rows of the weight, [G * out, in]."""

    def __init__(self, in_size: int, out_size: int, groups: int, *, dtype: torch.dtype | None = None) -> None:
        super().__init__(in_size, groups * out_size, dtype=dtype)
        self.groups = groups

    def forward(self, x_TGI: Tensor) -> Tensor:
        """[T, G, in] -> [T, G, out]."""
        return self.multiply(x_TGI, self.weight)

    def multiply(self, x_TGI: Tensor, weight: Tensor) -> Tensor:
        """By any weight of as many groups."""
        weight_GOI = weight.unflatten(0, (self.groups, -1))
        if self.pad_rows == 1 and kernels.loops_for_few(x_TGI, weight):
            return kernels.product_by_group(x_TGI, weight_GOI)
        parts = [product(x_TGI[:, g], weight_GOI[g], self.pad_rows) for g in range(self.groups)]
        return torch.stack(parts, 1)
