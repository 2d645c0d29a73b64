"""Decoding's share of the work: loops for a few rows, each beside its torch version in `model/`, the reference.

A step of decoding is hundreds of products and sums of a few rows. torch takes some ten microseconds to begin each, and
on processors without bf16 instructions multiplies few rows slowly. These loops are called once for what are many
operations there, read a weight once in the order in which it lies, and round where the torch version rounds its
results, not in between: they agree to the rounding of the dtype.

Callers ask `loops`, `loops_for_few` or `loops_for_experts` first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .library import TYPES, native


def product(x: Tensor, weight_OI: Tensor) -> Tensor:
    """[rows, I], [O, I] -> [rows, O]."""
    y = x.new_empty(x.shape[0], weight_OI.shape[0])
    _multiply(y, x, weight_OI, 1, 0, 0, 0)
    return y


def product_by_group(x_TGI: Tensor, weight_GOI: Tensor) -> Tensor:
    """[T, G, I], [G, O, I] -> [T, G, O]."""
    groups, out, _ = weight_GOI.shape
    y = x_TGI.new_empty(x_TGI.shape[0], groups, out)
    _multiply(y, x_TGI, weight_GOI, groups, x_TGI.stride(1), weight_GOI.stride(0), out)
    return y


def _multiply(y: Tensor, x: Tensor, weight: Tensor, groups: int, x_group: int, w_group: int, y_group: int) -> None:
    assert native is not None
    rows, inner, out = x.shape[0], x.shape[-1], weight.shape[-2]
    native.product(
        *(x.data_ptr(), weight.data_ptr(), y.data_ptr(), rows, inner, out, groups),
        *(x.stride(0), x_group, w_group, y.stride(0), y_group),
        *(TYPES[x.dtype], torch.get_num_threads()),
    )


def norm(x: Tensor, weight: Tensor | None, eps: float, turns_TN: Tensor | None = None, *, back: bool = False) -> Tensor:
    """x over the root of its mean square, times a weight, its last numbers turned; eps below 0: turned only.

    x is [T, ..., W], W a multiple of 16; its rows of one token share a turn [N].
    """
    assert native is not None
    x = x.contiguous()
    y = torch.empty_like(x)
    width = x.shape[-1]
    rows = x.numel() // width
    pairs, turns = 0, None
    if turns_TN is not None:
        pairs, turns = turns_TN.shape[1], turns_TN.data_ptr()
    native.norm(
        *(x.data_ptr(), y.data_ptr(), None if weight is None else weight.data_ptr(), eps),
        *(turns, pairs, rows // max(x.shape[0], 1), back, rows, width, TYPES[x.dtype], torch.get_num_threads()),
    )
    return y


def attend(
    q_THD: Tensor,
    near: tuple[Tensor, Tensor],
    far: tuple[Tensor, Tensor] | None,
    *,
    scale: float,
    value_width: int,
    sink_H: Tensor | None,
) -> Tensor:
    """[T, H, V]: `model.attend.attend` of rows in one pool or two, each with [T, K] int64 places."""
    assert native is not None
    T, H, D = q_THD.shape
    assert sink_H is None or (sink_H.dtype == torch.float32 and sink_H.is_contiguous())
    for pool, slots in (near, far or near):
        assert pool.dtype == q_THD.dtype, f"rows of a cache are {pool.dtype}, and queries {q_THD.dtype}"
        assert pool.is_contiguous() and slots.dtype == torch.int64
    q_THD = q_THD.contiguous()
    out = q_THD.new_empty(T, H, value_width)
    pool, slots = near
    slots = slots.contiguous()
    more, more_slots = (pool, slots[:, :0]) if far is None else far
    more_slots = more_slots.contiguous()
    failed = native.attend(
        *(q_THD.data_ptr(), out.data_ptr(), pool.data_ptr(), slots.data_ptr(), slots.shape[1]),
        *(more.data_ptr(), more_slots.data_ptr(), more_slots.shape[1]),
        *(None if sink_H is None else sink_H.data_ptr(), T, H, D, value_width, scale),
        *(TYPES[q_THD.dtype], torch.get_num_threads()),
    )
    if failed:
        raise MemoryError("no memory for the sums of a long context")
    return out


SCORINGS = {"sqrtsoftplus": 0, "sigmoid": 1, "softmax": 2}
"""As the loop numbers them."""


def choose(scores_TN: Tensor, visible_T: Tensor, k: int) -> Tensor:
    """[T, k] int64: the rows of the k highest scores among the first `visible`, ascending, then -1."""
    assert native is not None
    assert scores_TN.dtype == torch.float32 and k > 0
    scores_TN, visible_T = scores_TN.contiguous(), visible_T.to(torch.int64).contiguous()
    (T, N), chosen = scores_TN.shape, visible_T.new_empty(len(scores_TN), k)
    native.choose(
        *(scores_TN.data_ptr(), visible_T.data_ptr(), chosen.data_ptr(), T, N, k, torch.get_num_threads()),
    )
    return chosen


def route(
    x_TH: Tensor,
    weight_EH: Tensor,
    bias_E: Tensor | None,
    table_VK: Tensor | None,
    ids_T: Tensor,
    *,
    scoring: str,
    groups: int,
    groups_kept: int,
    top_k: int,
    normalise: bool,
    scale: float,
    tiny: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Experts [T, K] int64, their weights [T, K] and all scores [T, E], fp32; by a table, or by score and bias."""
    assert native is not None
    assert weight_EH.dtype == torch.float32 and weight_EH.is_contiguous()
    assert bias_E is None or (bias_E.dtype == torch.float32 and bias_E.is_contiguous())
    assert table_VK is None or (table_VK.dtype == torch.int32 and table_VK.is_contiguous())
    (T, H), E = x_TH.shape, weight_EH.shape[0]
    x_TH, ids_T = x_TH.contiguous(), ids_T.to(torch.int64).contiguous()
    scores = weight_EH.new_empty(T, E)
    chosen, weights = ids_T.new_empty(T, top_k), weight_EH.new_empty(T, top_k)
    native.route(
        *(x_TH.data_ptr(), weight_EH.data_ptr(), None if bias_E is None else bias_E.data_ptr()),
        *(None if table_VK is None else table_VK.data_ptr(), ids_T.data_ptr()),
        *(scores.data_ptr(), chosen.data_ptr(), weights.data_ptr(), T, H, E, groups, groups_kept, top_k),
        *(SCORINGS[scoring], normalise, scale, tiny, eps, TYPES[x_TH.dtype]),
    )
    return chosen, weights, scores


def swiglu(x_TH: Tensor, w1_IH: Tensor, w3_IH: Tensor, w2_HI: Tensor) -> Tensor:
    """[T, H]: one SwiGLU."""
    assert w3_IH.dtype == x_TH.dtype and w3_IH.shape == w1_IH.shape and w3_IH.is_contiguous()
    return _experts(x_TH, w1_IH.data_ptr(), w3_IH.data_ptr(), w2_HI, 0, None, None, 1, w1_IH.shape[0], None)


def experts(
    x_TH: Tensor, w13_EIH: Tensor, w2_EHI: Tensor, experts_TK: Tensor, weights_TK: Tensor, limit: float | None
) -> Tensor:
    """[T, H]: each token's experts (-1: none), weighted and added up. `limit` as in `Experts`."""
    count, inner = w2_EHI.shape[0], w2_EHI.shape[2]
    gate = w13_EIH.data_ptr()
    up = gate + inner * w13_EIH.stride(1) * w13_EIH.element_size()
    return _experts(x_TH, gate, up, w2_EHI, w13_EIH.stride(0), experts_TK, weights_TK, count, inner, limit)


def _experts(
    x_TH: Tensor,
    gate: int,
    up: int,
    down: Tensor,
    gate_step: int,
    experts_TK: Tensor | None,
    weights_TK: Tensor | None,
    count: int,
    inner: int,
    limit: float | None,
) -> Tensor:
    assert native is not None
    assert down.dtype == x_TH.dtype and down.is_contiguous()
    T, H = x_TH.shape
    x_TH = x_TH.contiguous()
    y = torch.empty_like(x_TH)
    chosen, weights, K = None, None, 1
    if experts_TK is not None and weights_TK is not None:
        experts_TK, weights_TK = experts_TK.to(torch.int64).contiguous(), weights_TK.float().contiguous()
        chosen, weights, K = experts_TK.data_ptr(), weights_TK.data_ptr(), experts_TK.shape[1]
    failed = native.experts(
        *(x_TH.data_ptr(), gate, up, down.data_ptr(), gate_step, inner * H, chosen, weights, y.data_ptr()),
        *(T, K, count, H, inner, limit or 0.0, TYPES[x_TH.dtype], torch.get_num_threads()),
    )
    if failed:
        raise MemoryError("no memory for the experts' rows")
    return y
