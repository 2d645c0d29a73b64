"""Loops that Python calls too slowly, in C, each beside its plain torch version: `native`, None where none was built.

The torch version is the reference and the only one with gradients; tests compare the two. Without a compiler the
package has no C part and does everything by torch alone.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor


def _load() -> ctypes.CDLL | None:
    built = Path(__file__).with_name("_hyper.so")
    if not built.exists():
        return None
    library = ctypes.CDLL(str(built))
    pointer = ctypes.c_void_p
    library.emberline_hyper_mix.argtypes = [
        *(pointer, pointer, pointer),
        *(ctypes.c_long, ctypes.c_int, ctypes.c_int, ctypes.c_float),
        *(pointer, pointer, pointer),
    ]
    return library


native = _load()


def hyper_mix(
    logits: Tensor, scale: Tensor, base: Tensor, streams: int, iterations: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """pre [T, S], post [T, S] and comb [T, S, S] of logits [T, (2 + S) * S]; all fp32 on the CPU, without gradients."""
    assert native is not None
    assert logits.dtype == scale.dtype == base.dtype == torch.float32
    assert logits.is_contiguous() and scale.is_contiguous() and base.is_contiguous()
    T = logits.shape[0]
    pre, post, comb = logits.new_empty(T, streams), logits.new_empty(T, streams), logits.new_empty(T, streams, streams)
    failed = native.emberline_hyper_mix(
        *(logits.data_ptr(), scale.data_ptr(), base.data_ptr()),
        *(T, streams, iterations, eps),
        *(pre.data_ptr(), post.data_ptr(), comb.data_ptr()),
    )
    assert not failed
    return pre, post, comb
