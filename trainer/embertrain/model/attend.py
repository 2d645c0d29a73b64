"""The core of every attention: queries against rows that are key and value at once.

A row's first `value_width` numbers are its value, the whole row is its key. Rows come from two places at most, a pool
and an extra pool (V4: the window and the compressed entries), and share one softmax. A sink is a score without a value:
it takes part in the softmax's sum only (arXiv 2606.19348 section 2.3.3). `attend` has the meaning of FlashMLA's decode
kernel; `attend_dense` is the same for many queries over one set of rows, where no row is gathered.

T queries, H heads, D key width, V value width, S rows of a pool, K indices a query, N rows all queries share.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import kernels
from ..kernels.products import matmul

BLOCK = 128
"""Queries of one sequence that are worked through together, at most."""
SCORES_MAX = 1 << 23
"""Scores of all heads alive at once: 32 MiB in fp32, however long the context."""
CHOICES_MAX = 1 << 20
"""Queries times rows that a top-k is taken of at once: some 40 bytes each while it lasts, without the loops in C."""


def block_size(numbers: int, most: int) -> int:
    """The power of two of queries, 1 to BLOCK, whose `numbers` each are no more than `most` together."""
    return min(BLOCK, 1 << max(0, (most // max(numbers, 1)).bit_length() - 1))


def attend(
    q_THD: Tensor,
    pool_SD: Tensor,
    indices_TK: Tensor,
    *,
    scale: float,
    value_width: int | None = None,
    extra_pool: Tensor | None = None,
    extra_indices: Tensor | None = None,
    sink_H: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Each query over the rows its indices name: out [T, H, V] in q's dtype, lse [T, H] in fp32.

    -1 is no row; what lies in a pool's other rows, NaN too, changes nothing. A query without a row gives out 0 and lse
    +inf. The sink changes out, never lse.
    """
    rows_TKD, seen_TK = gather(pool_SD, indices_TK)
    if extra_pool is not None and extra_indices is not None:
        more_TKD, more_TK = gather(extra_pool, extra_indices)
        rows_TKD, seen_TK = torch.cat([rows_TKD, more_TKD], 1), torch.cat([seen_TK, more_TK], 1)
    lse_TH = torch.logsumexp(_scores(q_THD, rows_TKD, seen_TK, scale), -1)
    empty_T = ~seen_TK.any(-1)
    out = attend_rows(q_THD, rows_TKD, seen_TK, scale=scale, value_width=value_width, sink_H=sink_H)
    return out.masked_fill(empty_T[:, None, None], 0), lse_TH.masked_fill(empty_T[:, None], torch.inf)


def attend_rows(
    q_THD: Tensor,
    rows_TKD: Tensor,
    seen_TK: Tensor | None,
    *,
    scale: float,
    value_width: int | None = None,
    sink_H: Tensor | None = None,
) -> Tensor:
    """`attend` over rows already gathered, without lse; every query must see a row. `seen_TK` None: all are seen."""
    scores_THK = _scores(q_THD, rows_TKD, seen_TK, scale)
    # Whole rows are multiplied and the rest thrown away: a slice of each row would be copied first.
    out = matmul(weights(scores_THK, sink_H).to(q_THD.dtype), rows_TKD)
    return out if value_width is None else out[..., :value_width]


def _scores(q_THD: Tensor, rows: Tensor, seen_TN: Tensor | None, scale: float) -> Tensor:
    """[T, H, N] fp32 over rows [N, D] or [T, N, D]; -inf where a row is not seen."""
    if rows.dim() == 3:
        scores = matmul(q_THD, rows.transpose(1, 2))
    else:
        scores = matmul(q_THD.flatten(0, 1), rows.t()).unflatten(0, q_THD.shape[:2])
    scores = scores.float() * scale
    return scores if seen_TN is None else scores.masked_fill(~seen_TN[:, None, :], -torch.inf)


def attend_dense(
    q_THD: Tensor,
    parts: list[tuple[Tensor, Tensor | None]],
    *,
    scale: float,
    value_width: int | None = None,
    sink_H: Tensor | None = None,
) -> Tensor:
    """Each query over all rows of all parts: out [T, H, V].

    A part is rows [N, D], or [T, N, D] where each query has its own, and which of them are seen, [T, N] (None: all).
    Every query must see a row.
    """
    T, H, _ = q_THD.shape
    p_THN = dense_weights(q_THD, parts, scale=scale, sink_H=sink_H).to(q_THD.dtype)
    out: Tensor | None = None
    for (rows, _), p in zip(parts, p_THN.split([rows.shape[-2] for rows, _ in parts], -1), strict=True):
        values = rows if value_width is None else rows[..., :value_width]
        term = matmul(p, values) if rows.dim() == 3 else matmul(p.flatten(0, 1), values).view(T, H, -1)
        out = term if out is None else out + term
    assert out is not None
    return out


def dense_weights(
    q_THD: Tensor, parts: list[tuple[Tensor, Tensor | None]], *, scale: float, sink_H: Tensor | None = None
) -> Tensor:
    """What each query gives to all rows of all parts, one part after the other: [T, H, N] fp32."""
    scores = [_scores(q_THD, rows, seen_TN, scale) for rows, seen_TN in parts]
    return weights(torch.cat(scores, -1) if len(scores) > 1 else scores[0], sink_H)


def weights(scores_THN: Tensor, sink_H: Tensor | None) -> Tensor:
    """The softmax over the last dimension, with the sink in its sum."""
    if sink_H is None:
        return torch.softmax(scores_THN, -1)
    sink = sink_H.float().view(1, -1, 1).expand(scores_THN.shape[0], -1, 1)
    return torch.softmax(torch.cat([scores_THN, sink], -1), -1)[..., :-1]


def gather(pool_SD: Tensor, indices_TK: Tensor) -> tuple[Tensor, Tensor]:
    """The rows [T, K, D] that indices name, zero where they are -1, and where they are not."""
    seen_TK = indices_TK >= 0
    rows = pool_SD.index_select(0, indices_TK.clamp(min=0).flatten()).view(*indices_TK.shape, -1)
    return rows.masked_fill(~seen_TK[..., None], 0), seen_TK


def top_k(scores_TN: Tensor, visible_T: Tensor, k: int) -> Tensor:
    """The rows of the k highest scores among the first `visible` of each query: bool [T, N].

    Of equal scores the lowest row is taken, so that a choice does not depend on how a kernel sorts. A query that sees
    at most k rows takes them all.
    """
    N = scores_TN.shape[-1]
    visible_TN = torch.arange(N, device=scores_TN.device) < visible_T[:, None]
    if k >= N:
        return visible_TN
    scores_TN = scores_TN.masked_fill(~visible_TN, -torch.inf)
    least_T1 = scores_TN.topk(k, dim=-1).values[:, -1:]
    above_TN = scores_TN > least_T1
    equal_TN = (scores_TN == least_T1) & visible_TN
    room_T1 = k - above_TN.sum(-1, keepdim=True)
    return above_TN | (equal_TN & (equal_TN.cumsum(-1) <= room_T1))


def top_indices(scores_TN: Tensor, visible_T: Tensor, k: int) -> Tensor:
    """[T, k] int64: the rows that `top_k` chooses, ascending, then -1."""
    if kernels.loops(scores_TN) and scores_TN.dtype == torch.float32:
        return kernels.choose(scores_TN, visible_T, k)
    return chosen_indices(top_k(scores_TN, visible_T, k), k)


def chosen_indices(chosen_TN: Tensor, k: int) -> Tensor:
    """[T, k] int64: the rows where chosen is true, ascending, then -1. At most k may be true in a query."""
    T, N = chosen_TN.shape
    place_TN = torch.where(chosen_TN, chosen_TN.cumsum(-1) - 1, k)
    out = torch.full((T, k + 1), -1, dtype=torch.int64, device=chosen_TN.device)
    out.scatter_(1, place_TN, torch.arange(N, device=chosen_TN.device).expand(T, N))
    return out[:, :k]
