"""V4's attention: a window of raw tokens and compressed entries of everything before, in one softmax.

One row a token is key and value of all heads. Its last numbers are rotated by its position; as the value carries that
rotation too, the output is rotated back by the query's. A layer of ratio 0 sees the window alone; one of ratio 128
(HCA) every entry besides, one of ratio 4 (CSA) those that the indexer chooses. Query t sees the tokens t - 127 to t and
the entries whose windows are closed: entry s where s < (t + 1) // ratio. (arXiv 2606.19348 section 2.3)

T tokens, H heads, D head size, N entries.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import kernels
from ..cache.step import Rows, Step
from .attend import (
    BLOCK,
    CHOICES_MAX,
    SCORES_MAX,
    attend_dense,
    attend_rows,
    block_size,
    dense_weights,
    gather,
    top_indices,
    top_k,
)
from .batch import Segment
from .compressor import Compressor
from .config import Hybrid
from .indexer import CompressedIndexer
from .lesson import Lessons
from .linear import GroupedLinear, Linear
from .norm import RMSNorm, rms
from .rope import Angles, rotate

_GATHER_FROM = 8
"""A block gathers its entries when there are this many times more than it may choose; below, a mask is cheaper."""
_GATHERED_MAX = 1 << 23
"""Numbers of gathered entries alive at once."""


class HybridAttention(nn.Module):
    """Attention of one V4 layer."""

    def __init__(self, spec: Hybrid, hidden_size: int, layer: int, eps: float) -> None:
        super().__init__()
        self.spec, self.layer, self.eps = spec, layer, eps
        H, D = spec.heads, spec.head_dim
        self.wq_a = Linear(hidden_size, spec.q_rank)
        self.q_norm = RMSNorm(spec.q_rank, eps)
        self.wq_b = Linear(spec.q_rank, H * D)
        self.wkv = Linear(hidden_size, D)
        self.kv_norm = RMSNorm(D, eps)
        self.wo_a = GroupedLinear(H * D // spec.out_groups, spec.out_rank, spec.out_groups)
        self.wo_b = Linear(spec.out_groups * spec.out_rank, hidden_size)
        self.sink = nn.Parameter(torch.zeros(H, dtype=torch.float32))
        self.kind = "csa" if spec.overlaps else "hca"
        self.compressor: Compressor | None = None
        self.indexer: CompressedIndexer | None = None
        if spec.ratio:
            self.compressor = Compressor(
                hidden_size, D, spec.ratio, rope=spec.rope, eps=eps, kind=self.kind, state_kind="state"
            )
        if spec.index:
            self.indexer = CompressedIndexer(
                spec.index, hidden_size, spec.q_rank, ratio=spec.ratio, rope=spec.rope, eps=eps
            )

    def forward(self, x_TH: Tensor, rows: Rows, angles: Angles) -> Tensor:
        """[T, hidden] -> [T, hidden]."""
        turns = angles.tokens(self.spec.rope)
        latent_TR = self.q_norm(self.wq_a(x_TH))
        q_THD = rms(self.wq_b(latent_TR).unflatten(-1, (self.spec.heads, -1)), self.eps, turns)
        kv_TD = self.kv_norm(self.wkv(x_TH), turns)
        state = self.compressor.state(x_TH) if self.compressor else None
        # Only lessons reach an indexer's weights, and they stop there.
        index_state = self.indexer.compressor.state(x_TH.detach()) if self.indexer else None
        outs = []
        for run in rows.runs:
            at = slice(run[0].start, run[-1].start + run[-1].count)
            parts = _Parts(
                q_THD[at], kv_TD[at], x_TH[at], latent_TR[at], turns[at], _cut(state, at), _cut(index_state, at)
            )
            if isinstance(rows, Step) and run[0].count == 1:
                outs.append(self._decode(parts, rows, run, angles))
            else:
                outs.append(self._segment(parts, rows, run[0], angles))
        out_THD = torch.cat(outs) if len(outs) > 1 else outs[0]
        return self.project(rotate(out_THD, turns, back=True))

    def project(self, out_THD: Tensor) -> Tensor:
        """The output projection: heads in groups, each to a low rank, then all to the hidden size."""
        grouped = out_THD.flatten(1).unflatten(-1, (self.spec.out_groups, -1))
        return self.wo_b(self.wo_a(grouped).flatten(1))

    def _segment(self, parts: _Parts, rows: Rows, segment: Segment, angles: Angles) -> Tensor:
        """Many tokens of one sequence, in blocks of queries: [count, H, D]."""
        back = min(self.spec.window - 1, segment.first)
        window = rows.append(self.layer, "window", segment, segment.first, parts.kv, segment.first - back)
        entries = keys = None
        if self.compressor and parts.state is not None:
            entries = self.compressor.append(rows, self.layer, segment, parts.state, angles)
        if self.indexer and parts.index_state is not None:
            keys = self.indexer.compressor.append(rows, self.layer, segment, parts.index_state, angles)
        outs = []
        begin = segment.first
        while begin < segment.end:
            size = self._block_size(begin)
            end = min(segment.end, (begin // size + 1) * size)
            outs.append(
                self._block(parts, segment, begin, end, window, segment.first - back, entries, keys, rows.lessons)
            )
            begin = end
        return torch.cat(outs) if len(outs) > 1 else outs[0]

    def _block_size(self, position: int) -> int:
        """Queries worked through together from this position on, so that memory is the same in any context.

        A power of two that depends on nothing else: blocks end at the same positions however a prompt is cut.
        """
        spec = self.spec
        entries = position // spec.ratio if spec.ratio else 0
        if self.indexer is None or entries < _GATHER_FROM * self.indexer.spec.top_k:
            return block_size(spec.heads * (entries + 2 * BLOCK), SCORES_MAX)
        k = self.indexer.spec.top_k
        return min(block_size(entries, CHOICES_MAX), block_size(k * spec.head_dim, _GATHERED_MAX))

    def _block(
        self,
        parts: _Parts,
        segment: Segment,
        begin: int,
        end: int,
        window: Tensor,
        window_first: int,
        entries: Tensor | None,
        keys: Tensor | None,
        lessons: Lessons | None,
    ) -> Tensor:
        """The queries at positions `begin` to `end`."""
        spec = self.spec
        at = slice(begin - segment.first, end - segment.first)
        q = parts.q[at]
        first = max(window_first, begin - spec.window + 1)
        local = window[first - window_first : end - window_first]
        positions = torch.arange(begin, end, device=q.device)
        behind = positions[:, None] - torch.arange(first, end, device=q.device)
        near = (local, (behind >= 0) & (behind < spec.window))
        closed = end // spec.ratio if spec.ratio else 0
        if entries is None or closed == 0:
            return attend_dense(q, [near], scale=spec.scale, sink_H=self.sink)
        entries = entries[:closed]
        visible = (positions + 1) // spec.ratio
        seen = torch.arange(closed, device=q.device) < visible[:, None]
        far = (entries, seen)
        if self.indexer is None or keys is None or (closed <= self.indexer.spec.top_k and lessons is None):
            return attend_dense(q, [near, far], scale=spec.scale, sink_H=self.sink)
        k = self.indexer.spec.top_k
        queries = self.indexer.queries(parts.latent[at].detach(), parts.turns[at])
        scores = self.indexer.scores(queries, self.indexer.weights(parts.x[at].detach()), keys[:closed])
        if closed > k and not (lessons and lessons.dense):
            if closed >= _GATHER_FROM * k:
                indices = top_indices(scores.detach(), visible, k)
                far = gather(entries, indices)
                scores = scores.gather(1, indices.clamp(min=0))
            else:
                far = (entries, top_k(scores.detach(), visible, k))
        if lessons is not None:
            with torch.no_grad():
                given = dense_weights(q, [near, far], scale=spec.scale, sink_H=self.sink)[..., len(local) :]
            lessons.add(self.layer, given, scores, far[1])
        return attend_dense(q, [near, far], scale=spec.scale, sink_H=self.sink)

    def _decode(self, parts: _Parts, step: Step, run: tuple[Segment, ...], angles: Angles) -> Tensor:
        """One token of each of B sequences: [B, H, D]."""
        layer, spec = self.layer, self.spec
        step.write(layer, "window", run, tuple(s.first for s in run), parts.kv)
        near = step.last(layer, "window", run, min(spec.window, max(s.end for s in run)))
        far = None
        if self.compressor and parts.state is not None:
            self.compressor.step(step, layer, run, parts.state, angles)
        if self.indexer and parts.index_state is not None:
            self.indexer.compressor.step(step, layer, run, parts.index_state, angles)
            if max(s.end // spec.ratio for s in run) > self.indexer.spec.top_k:
                far = self._choose(parts, step, run)
        if self.compressor and far is None:
            far = step.all(layer, self.kind, run)
        alike = step.pool(layer, "window").dtype == parts.q.dtype and self.sink.dtype == torch.float32
        if alike and kernels.loops(parts.q) and parts.q.shape[-1] % 32 == 0:
            more = None if far is None else (step.pool(layer, self.kind), far)
            pool = step.pool(layer, "window")
            return kernels.attend(
                *(parts.q, (pool, near), more), scale=spec.scale, value_width=spec.head_dim, sink_H=self.sink
            )
        # Where every sequence has as many rows, none is missing, and nothing has to be masked.
        held = _held(step.pool(layer, "window"), near, min(s.end for s in run) >= near.shape[1])
        slots = near
        if far is not None and far.shape[1]:
            whole = min(s.end // spec.ratio for s in run) >= far.shape[1]
            held = torch.cat([held, _held(step.pool(layer, self.kind), far, whole)], 1)
            slots = torch.cat([near, far], 1)
        return attend_rows(parts.q, held, slots >= 0, scale=spec.scale, sink_H=self.sink)

    def _choose(self, parts: _Parts, step: Step, run: tuple[Segment, ...]) -> Tensor:
        """[B, k]: where the entries lie that the indexer chooses, sequence by sequence."""
        assert self.indexer is not None
        ratio = self.spec.ratio
        queries = self.indexer.queries(parts.latent, parts.turns)
        weights = self.indexer.weights(parts.x)
        row = step.spec(self.layer, "index")
        chosen = []
        for i, segment in enumerate(run):
            assert segment.sequence is not None
            count = segment.end // ratio
            keys = step.cache.read(self.layer, row, segment.sequence, 0, count)
            visible = torch.full((1,), count, device=keys.device)
            chosen.append(self.indexer.choose(queries[i : i + 1], weights[i : i + 1], keys, visible))
        return step.slots(self.layer, self.kind, run, torch.cat(chosen))


class _Parts:
    """What a run of tokens brings to its attention."""

    def __init__(
        self,
        q: Tensor,
        kv: Tensor,
        x: Tensor,
        latent: Tensor,
        turns: Tensor,
        state: Tensor | None,
        index_state: Tensor | None,
    ) -> None:
        self.q, self.kv, self.x, self.latent, self.turns = q, kv, x, latent, turns
        self.state, self.index_state = state, index_state


def _held(pool: Tensor, slots_BK: Tensor, whole: bool) -> Tensor:
    """[B, K, D]: the rows at these places. Unless the places are `whole` some are -1, and another sequence's row there
    is zeroed: a weight of zero does not rid a sum of NaN."""
    if not whole:
        return gather(pool, slots_BK)[0]
    return pool.index_select(0, slots_BK.flatten()).unflatten(0, slots_BK.shape)


def _cut(rows: Tensor | None, at: slice) -> Tensor | None:
    return None if rows is None else rows[at]
