"""Products of rows sorted by expert, and their gradients: one call for all experts. See `grouped.c`.

torch is called once for each expert, and for its dozens of rows takes longer to begin than to multiply. Every sum runs
over its terms in one order, whatever the number of threads.

R rows, E experts, I and O what a product takes and gives.
"""

from __future__ import annotations

import ctypes
import itertools

import torch
from torch import Tensor

from .library import TYPES, native
from .memory import large


def product(rows_RI: Tensor, weights_EOI: Tensor, counts: tuple[int, ...]) -> Tensor:
    """[R, O]: rows, each times its expert's weight."""
    y_RO = rows_RI.new_empty(rows_RI.shape[0], weights_EOI.shape[1])
    _call(0, rows_RI, weights_EOI, y_RO, counts, weights_EOI.shape[2], weights_EOI.shape[1])
    return y_RO


def input_gradient(grads_RO: Tensor, weights_EOI: Tensor, counts: tuple[int, ...]) -> Tensor:
    """[R, I]."""
    y_RI = grads_RO.new_empty(grads_RO.shape[0], weights_EOI.shape[2])
    _call(1, grads_RO, weights_EOI, y_RI, counts, weights_EOI.shape[2], weights_EOI.shape[1])
    return y_RI


def weight_gradient(grads_RO: Tensor, rows_RI: Tensor, counts: tuple[int, ...]) -> Tensor:
    """[E, O, I]; zeros for experts without rows."""
    y_EOI = large(rows_RI, len(counts), grads_RO.shape[1], rows_RI.shape[1])
    _call(2, grads_RO, rows_RI, y_EOI, counts, rows_RI.shape[1], grads_RO.shape[1])
    return y_EOI


def swiglu(gate_up: Tensor, limit: float | None) -> Tensor:
    """[R, I]: silu(gate) * up of [R, gate | up], both clamped as in `Experts`; I is a multiple of 32."""
    y = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
    _swiglu(gate_up, None, y, limit)
    return y


def swiglu_gradient(gate_up: Tensor, grads_RI: Tensor, limit: float | None) -> Tensor:
    """[R, gate | up]: their gradients, given that of the result."""
    assert grads_RI.dtype == gate_up.dtype
    grads_RI, y = grads_RI.contiguous(), torch.empty_like(gate_up)
    _swiglu(gate_up, grads_RI.data_ptr(), y, limit)
    return y


def _swiglu(gate_up: Tensor, grads: int | None, y: Tensor, limit: float | None) -> None:
    assert native is not None and gate_up.is_contiguous()
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    native.swiglu(
        *(gate_up.data_ptr(), grads, y.data_ptr(), rows, width, limit or 0.0),
        *(TYPES[gate_up.dtype], torch.get_num_threads()),
    )


def _call(kind: int, a: Tensor, b: Tensor, y: Tensor, counts: tuple[int, ...], inner: int, out: int) -> None:
    assert native is not None
    assert a.dtype == b.dtype and b.is_contiguous()
    a = a.contiguous()
    begins = (ctypes.c_longlong * (len(counts) + 1))(0, *itertools.accumulate(counts))
    native.grouped(
        *(kind, a.data_ptr(), b.data_ptr(), y.data_ptr(), begins, len(counts), inner, out),
        *(TYPES[a.dtype], torch.get_num_threads()),
    )
