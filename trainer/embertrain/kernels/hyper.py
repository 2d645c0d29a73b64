"""The hyper-connections' loops, beside `model/hyper.py`, which is the reference. Callers ask `loops` first."""

from __future__ import annotations

import torch
from torch import Tensor

from .library import TYPES, native


def hyper_mix(
    logits: Tensor, scale: Tensor, base: Tensor, streams: int, iterations: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """pre [T, S], post [T, S] and comb [T, S, S] of logits [T, (2 + S) * S]; all fp32 on the CPU, without gradients."""
    assert native is not None
    assert logits.dtype == scale.dtype == base.dtype == torch.float32
    assert logits.is_contiguous() and scale.is_contiguous() and base.is_contiguous()
    T = logits.shape[0]
    pre, post, comb = logits.new_empty(T, streams), logits.new_empty(T, streams), logits.new_empty(T, streams, streams)
    failed = native.hyper_mix(
        *(logits.data_ptr(), scale.data_ptr(), base.data_ptr()),
        *(T, streams, iterations, eps),
        *(pre.data_ptr(), post.data_ptr(), comb.data_ptr()),
    )
    assert not failed
    return pre, post, comb


def hyper_begin(
    x_TSD: Tensor, fn: Tensor, scale: Tensor, base: Tensor, *, iterations: int, eps: float, rms_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """A block's input [T, D], and post [T, S] and comb [T, S, S] fp32: `HyperConnection.forward` of a few tokens."""
    assert native is not None
    assert all(t.dtype == torch.float32 and t.is_contiguous() for t in (fn, scale, base))
    T, S, D = x_TSD.shape
    x_TSD = x_TSD.contiguous()
    y = x_TSD.new_empty(T, D)
    post, comb = fn.new_empty(T, S), fn.new_empty(T, S, S)
    failed = native.hyper_begin(
        *(x_TSD.data_ptr(), fn.data_ptr(), scale.data_ptr(), base.data_ptr()),
        *(y.data_ptr(), post.data_ptr(), comb.data_ptr(), T, S, D),
        *(iterations, eps, rms_eps, TYPES[x_TSD.dtype], torch.get_num_threads()),
    )
    assert not failed
    return y, post, comb


def expand(y_TD: Tensor, post_TS: Tensor, comb_TSS: Tensor, x_TSD: Tensor) -> Tensor:
    """The streams after a block: `model.hyper.expand`. D is a multiple of 16."""
    assert native is not None
    T, S, D = x_TSD.shape
    assert post_TS.dtype == comb_TSS.dtype == torch.float32 and y_TD.dtype == x_TSD.dtype
    y_TD, x_TSD = y_TD.contiguous(), x_TSD.contiguous()
    post_TS, comb_TSS = post_TS.contiguous(), comb_TSS.contiguous()
    out = torch.empty_like(x_TSD)
    native.expand(
        *(y_TD.data_ptr(), post_TS.data_ptr(), comb_TSS.data_ptr(), x_TSD.data_ptr(), out.data_ptr()),
        *(T, S, D, TYPES[x_TSD.dtype], torch.get_num_threads()),
    )
    return out
