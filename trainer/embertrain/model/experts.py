"""Feed-forward parts: SwiGLUs, one for all tokens or many for some each.

    y = (silu(x W1) * (x W3)) W2

In V4 routed experts clamp what goes in: gate <= limit, -limit <= up <= limit. The shared one does not.

Experts take rows sorted by expert with their counts, or [E, M, H], M rows for each. They know nothing of tokens,
weights of choices, or where rows come from. `grouped_linear` is their one product, as `Linear` is everybody else's.

R rows, E experts, M rows of one, I and O what a product takes and gives, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import kernels
from ..kernels.products import linear, linear_into
from .config import Mixture
from .linear import Linear
from .pointwise import silu

Counts = tuple[int, ...]
"""Rows of each expert."""


@dataclass(frozen=True, slots=True)
class Part:
    """Rows, sorted by expert, that are multiplied by themselves. A row's bits depend on how many rows of its expert are
    multiplied with it, and a weight's gradient on the order of its rows."""

    counts: Counts
    fullest: int
    """Rows of the fullest expert, which may be on another rank: by it a product is chosen."""


class Shared(nn.Module):
    """One SwiGLU for all tokens."""

    def __init__(self, hidden_size: int, inner_size: int) -> None:
        super().__init__()
        self.w1 = Linear(hidden_size, inner_size)
        self.w3 = Linear(hidden_size, inner_size)
        self.w2 = Linear(inner_size, hidden_size)

    def forward(self, x_TH: Tensor) -> Tensor:
        few = self.w1.pad_rows == 1 and type(self.w1) is type(self.w2) is type(self.w3) is Linear
        if few and kernels.loops_for_few(x_TH, self.w1.weight) and self.w2.weight.shape[1] % 32 == 0:
            return kernels.swiglu(x_TH, self.w1.weight, self.w3.weight, self.w2.weight)
        y: Tensor = self.w2(silu(self.w1(x_TH), steady=self.w1.pad_rows > 1) * self.w3(x_TH))
        return y


class Experts(nn.Module):
    """Many SwiGLUs; `w13` [E, 2 * inner, H] holds gate rows, then up rows."""

    def __init__(self, spec: Mixture, hidden_size: int) -> None:
        super().__init__()
        self.spec = spec
        self.pad_rows = 1
        self.w13 = nn.Parameter(torch.empty(spec.experts, 2 * spec.inner_size, hidden_size))
        self.w2 = nn.Parameter(torch.empty(spec.experts, hidden_size, spec.inner_size))

    def forward(self, rows_RH: Tensor, counts: Counts, parts: Sequence[Part] = ()) -> Tensor:
        """[R, H] -> [R, H] of rows sorted by expert; of the experts that are on this rank. With `parts`, one after
        another, each of them is."""
        if not parts:
            return self.multiply(rows_RH, counts)
        some = list(zip(rows_RH.split([sum(part.counts) for part in parts]), parts, strict=True))
        # One without rows would cost a gradient of all weights; if there are no others, they still have one.
        some = [(rows, part) for rows, part in some if len(rows)] or some[:1]
        return torch.cat([self.multiply(rows, part.counts, part.fullest) for rows, part in some])

    def multiply(self, rows_RH: Tensor, counts: Counts, fullest: int = 0) -> Tensor:
        """Of rows of one part, with `fullest` as in `Part`."""
        gate_up = grouped_linear(rows_RH, self.w13, counts, self.pad_rows, fullest)
        inner = swiglu(gate_up, self.spec.swiglu_limit, self.pad_rows > 1)
        return grouped_linear(inner, self.w2, counts, self.pad_rows, fullest)

    def few(self, x_TH: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor | None:
        """[T, H]: of each token the weighted sum of its experts (-1: none), without sorting rows first; None where
        tokens are many, or this is not the faster way."""
        if self.pad_rows > 1 or self.w2.shape[2] % 32 or not kernels.loops_for_experts(x_TH, self.w13, self.spec.top_k):
            return None
        return kernels.experts(x_TH, self.w13, self.w2, experts_TK, weights_TK, self.spec.swiglu_limit)

    def padded(self, rows_EMH: Tensor) -> Tensor:
        """[E, M, H] -> [E, M, H]: as many rows for all, of which any may be padding. It needs no counts on the host: a
        low-latency all-to-all gives rows so."""
        inner = swiglu(torch.bmm(rows_EMH, self.w13.transpose(1, 2)), self.spec.swiglu_limit)
        return torch.bmm(inner, self.w2.transpose(1, 2))


# ---- the product


def grouped_linear(rows_RI: Tensor, weights_EOI: Tensor, counts: Counts, pad_rows: int = 1, fullest: int = 0) -> Tensor:
    """[R, O]: rows sorted by expert, each times its expert's weight. Weights of another type than plain tensors have
    their products here too; of experts that are spread over ranks, those of this rank are meant.

    `pad_rows`: an expert's rows are multiplied that many at a time (see `linear.product`); without gradients.
    `fullest`: if an expert elsewhere has more rows than those of `counts`, how many (see `Part`).
    """
    weights_EOI = _here(weights_EOI)
    assert rows_RI.shape[0] == sum(counts)
    assert weights_EOI.shape[0] == len(counts)
    if torch.is_grad_enabled() and (rows_RI.requires_grad or weights_EOI.requires_grad):
        y_RO: Tensor = _Grouped.apply(rows_RI, weights_EOI, counts, fullest)
        return y_RO
    return _products(rows_RI, weights_EOI, counts, pad_rows, fullest)


def _here(weights_EOI: Tensor) -> Tensor:
    """Those on this rank: experts that are spread over ranks are a DTensor, which only the one who spreads imports."""
    to_local = getattr(weights_EOI, "to_local", None)
    return weights_EOI if to_local is None else to_local()


def _products(rows_RI: Tensor, weights_EOI: Tensor, counts: Counts, pad_rows: int, fullest: int) -> Tensor:
    """A matrix product for each expert that has rows, straight into its part of the result."""
    if pad_rows == 1 and kernels.loops_for_groups(rows_RI, weights_EOI, counts, fullest):
        return kernels.grouped.product(rows_RI, weights_EOI, counts)
    y_RO = rows_RI.new_empty(rows_RI.shape[0], weights_EOI.shape[1])
    start = 0
    for expert, n in enumerate(counts):
        if n == 0:
            continue
        part = rows_RI[start : start + n]
        short = -n % pad_rows
        if short:
            y_RO[start : start + n] = linear(F.pad(part, (0, 0, 0, short)), weights_EOI[expert])[:n]
        else:
            linear_into(y_RO[start : start + n], part, weights_EOI[expert])
        start += n
    return y_RO


def grouped_input_gradient(grads_RO: Tensor, weights_EOI: Tensor, counts: Counts, fullest: int = 0) -> Tensor:
    """[R, I]."""
    if kernels.loops_for_groups(grads_RO, weights_EOI, counts, fullest, gradient=True):
        return kernels.grouped.input_gradient(grads_RO, weights_EOI, counts)
    return _products(grads_RO, weights_EOI.transpose(1, 2), counts, 1, fullest)


def grouped_weight_gradient(grads_RO: Tensor, rows_RI: Tensor, counts: Counts, fullest: int = 0) -> Tensor:
    """[E, O, I]; zeros for experts without rows."""
    if kernels.loops_for_groups(grads_RO, rows_RI, counts, fullest, gradient=True):
        return kernels.grouped.weight_gradient(grads_RO, rows_RI, counts)
    grads_EOI = kernels.large(rows_RI, len(counts), grads_RO.shape[1], rows_RI.shape[1])
    start = 0
    for expert, n in enumerate(counts):
        if n == 0:
            grads_EOI[expert].zero_()
            continue
        linear_into(grads_EOI[expert], grads_RO[start : start + n].t(), rows_RI[start : start + n].t())
        start += n
    return grads_EOI


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RI: Tensor, weights_EOI: Tensor, counts: Counts, fullest: int) -> Tensor:
        ctx.save_for_backward(rows_RI, weights_EOI)
        ctx.rows = (counts, fullest)
        return _products(rows_RI, weights_EOI, counts, 1, fullest)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows_RI, weights_EOI = ctx.saved_tensors
        grads_RO = grads[0].contiguous()
        return (
            grouped_input_gradient(grads_RO, weights_EOI, *ctx.rows) if ctx.needs_input_grad[0] else None,
            grouped_weight_gradient(grads_RO, rows_RI, *ctx.rows) if ctx.needs_input_grad[1] else None,
            None,
            None,
        )


def swiglu(gate_up: Tensor, limit: float | None, steady: bool = False) -> Tensor:
    """silu(gate) * up of [..., gate | up], both clamped."""
    if torch.is_grad_enabled() and gate_up.requires_grad:
        y: Tensor = _SwiGLU.apply(gate_up, limit)
        return y
    if not steady and _loops(gate_up):
        return kernels.grouped.swiglu(gate_up, limit)
    gate, up = _clamped(gate_up, limit)
    return silu(gate, steady=steady).mul_(up)


def _loops(gate_up: Tensor) -> bool:
    return kernels.loops(gate_up) and gate_up.dim() == 2 and gate_up.shape[1] % 64 == 0 and gate_up.is_contiguous()


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up of [..., gate | up], both clamped; only its input is kept for the gradient."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, limit: float | None) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.limit = limit
        if _loops(gate_up):
            return kernels.grouped.swiglu(gate_up, limit)
        gate, up = _clamped(gate_up, limit)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gate_up,) = ctx.saved_tensors
        limit: float | None = ctx.limit
        if _loops(gate_up):
            return kernels.grouped.swiglu_gradient(gate_up, grads[0], limit), None
        gate, up = _clamped(gate_up, limit)
        grad = torch.empty_like(gate_up)
        grad_gate, grad_up = grad.chunk(2, -1)
        torch.ops.aten.silu_backward.grad_input(grads[0] * up, gate, grad_input=grad_gate)
        torch.mul(F.silu(gate), grads[0], out=grad_up)
        if limit is not None:
            raw_gate, raw_up = gate_up.chunk(2, -1)
            grad_gate.masked_fill_(raw_gate > limit, 0.0)
            grad_up.masked_fill_(raw_up.abs() > limit, 0.0)
        return grad, None


def _clamped(gate_up: Tensor, limit: float | None) -> tuple[Tensor, Tensor]:
    gate, up = gate_up.chunk(2, -1)
    return (gate, up) if limit is None else (gate.clamp(max=limit), up.clamp(-limit, limit))
