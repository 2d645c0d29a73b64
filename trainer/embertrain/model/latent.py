"""V3's multi-head latent attention, and V3.2's sparse form of it.

A token keeps one latent row, normalised, and one rotated key that all heads share. Two ways to attend give the same:

- naive: latents are expanded to a key and a value per head. Fewest operations where many queries share the expansion:
  training and prefill.
- absorbed: the expansion's matrices move to the query and to the output; all heads attend to the latent rows
  themselves, key width kv_rank + rope, value width kv_rank. Nothing is expanded: decoding.

In V3.2 an indexer chooses the tokens a query sees. (arXiv 2412.19437 section 2.1.1; 2512.02556 section 2.1)

T tokens, H heads, N rows, P nope width, V value width, R kv_rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import kernels
from ..cache.step import Rows, Step
from ..kernels.products import matmul
from .attend import (
    CHOICES_MAX,
    SCORES_MAX,
    attend_dense,
    attend_rows,
    block_size,
    gather,
    top_k,
)
from .batch import Segment
from .config import Latent
from .indexer import TokenIndexer
from .lesson import Lessons
from .linear import Linear
from .norm import RMSNorm
from .rope import Angles, rotate

_EXPANDED_MAX = 1 << 26
"""Numbers of expanded keys and values; a longer context is attended to absorbed in prefill, too."""
_GATHERED_MAX = 1 << 22
"""Numbers of latent rows that a run of decoding sequences may gather at once; above, one sequence after the other."""


class LatentAttention(nn.Module):
    """Attention of one V3 or V3.2 layer."""

    def __init__(self, spec: Latent, hidden_size: int, layer: int, eps: float) -> None:
        super().__init__()
        self.spec, self.layer = spec, layer
        H, width = spec.heads, spec.nope_dim + spec.rope.dim
        if spec.q_rank is None:
            self.wq = Linear(hidden_size, H * width)
        else:
            self.wq_a = Linear(hidden_size, spec.q_rank)
            self.q_norm = RMSNorm(spec.q_rank, eps)
            self.wq_b = Linear(spec.q_rank, H * width)
        self.wkv_a = Linear(hidden_size, spec.kv_rank + spec.rope.dim)
        self.kv_norm = RMSNorm(spec.kv_rank, eps)
        self.wkv_b = Linear(spec.kv_rank, H * (spec.nope_dim + spec.value_dim))
        self.wo = Linear(H * spec.value_dim, hidden_size)
        self._copied: tuple[Tensor, tuple[int, int], Tensor, Tensor] | None = None
        self.indexer: TokenIndexer | None = None
        if spec.index and spec.q_rank is not None:
            self.indexer = TokenIndexer(spec.index, hidden_size, spec.q_rank, spec.rope)

    def forward(self, x_TH: Tensor, rows: Rows, angles: Angles) -> Tensor:
        """[T, hidden] -> [T, hidden]."""
        spec = self.spec
        turns = angles.tokens(spec.rope)
        low_TR = None if spec.q_rank is None else self.q_norm(self.wq_a(x_TH))
        q_THD = (self.wq(x_TH) if low_TR is None else self.wq_b(low_TR)).unflatten(-1, (spec.heads, -1))
        q_THD = rotate(q_THD, turns)
        latent, key = self.wkv_a(x_TH).split([spec.kv_rank, spec.rope.dim], -1)
        row_TD = torch.cat([self.kv_norm(latent), rotate(key, turns)], -1)
        # Only lessons reach an indexer's weights, and they stop there.
        index_key = self.indexer.keys(x_TH.detach(), turns) if self.indexer else None
        outs = []
        for run in rows.runs:
            at = slice(run[0].start, run[-1].start + run[-1].count)
            low = None if low_TR is None else low_TR[at]
            index = None if index_key is None else index_key[at]
            if isinstance(rows, Step) and run[0].count == 1:
                outs.append(self._decode(q_THD[at], row_TD[at], x_TH[at], low, index, turns[at], rows, run))
            else:
                outs.append(self._segment(q_THD[at], row_TD[at], x_TH[at], low, index, turns[at], rows, run[0]))
        return self.wo((torch.cat(outs) if len(outs) > 1 else outs[0]).flatten(1))

    def _segment(
        self,
        q_THD: Tensor,
        row_TD: Tensor,
        x_TH: Tensor,
        low_TR: Tensor | None,
        index_key: Tensor | None,
        turns: Tensor,
        rows: Rows,
        segment: Segment,
    ) -> Tensor:
        """Many tokens of one sequence, naive: [count, H, V]."""
        spec = self.spec
        held = rows.append(self.layer, "latent", segment, segment.first, row_TD, 0)
        keys = None
        if index_key is not None:
            keys = rows.append(self.layer, "index", segment, segment.first, index_key, 0)
        if len(held) * spec.heads * (spec.nope_dim + spec.value_dim) > _EXPANDED_MAX and not torch.is_grad_enabled():
            return self._blocks(
                q_THD, x_TH, low_TR, turns, segment, keys, lambda q, n, seen: self._absorb(q, held[:n], seen)
            )
        k_HND, v_HNV = self._expand(held)
        taught = rows.lessons if self.indexer else None
        if segment.first == 0 and taught is None and (self.indexer is None or segment.end <= self.indexer.spec.top_k):
            out = F.scaled_dot_product_attention(
                q_THD.transpose(0, 1)[None], k_HND[None], v_HNV[None], is_causal=True, scale=spec.scale
            )
            return out[0].transpose(0, 1)

        def naive(q: Tensor, n: int, seen: Tensor) -> Tensor:
            keys, values = k_HND[None, :, :n], v_HNV[None, :, :n]
            out = F.scaled_dot_product_attention(
                q.transpose(0, 1)[None], keys, values, attn_mask=seen, scale=spec.scale
            )
            return out[0].transpose(0, 1)

        return self._blocks(q_THD, x_TH, low_TR, turns, segment, keys, naive, (taught, k_HND) if taught else None)

    def _blocks(
        self,
        q_THD: Tensor,
        x_TH: Tensor,
        low_TR: Tensor | None,
        turns: Tensor,
        segment: Segment,
        keys: Tensor | None,
        attend: Callable[[Tensor, int, Tensor], Tensor],
        taught: tuple[Lessons, Tensor] | None = None,
    ) -> Tensor:
        """Block by block: `attend` gets queries, how many rows there are, and which of them each query sees.

        `taught` are the indexer's lessons and the keys they are about.
        """
        outs = []
        dense = taught is not None and taught[0].dense
        begin = segment.first
        while begin < segment.end:
            # A power of two that depends on the position alone: blocks end where they always end.
            size = min(
                block_size(self.spec.heads * (begin + 1), 4 * SCORES_MAX), block_size(begin + 1, 4 * CHOICES_MAX)
            )
            end = min(segment.end, (begin // size + 1) * size)
            at = slice(begin - segment.first, end - segment.first)
            positions = torch.arange(begin, end, device=q_THD.device)
            seen = torch.arange(end, device=q_THD.device) <= positions[:, None]
            scored = taught is not None or (self.indexer is not None and end > self.indexer.spec.top_k)
            if self.indexer and keys is not None and low_TR is not None and scored:
                queries = self.indexer.queries(low_TR[at].detach(), turns[at])
                scores = self.indexer.scores(queries, self.indexer.weights(x_TH[at].detach()), keys[:end])
                if not dense:
                    seen = top_k(scores.detach(), positions + 1, self.indexer.spec.top_k)
                if taught is not None:
                    lessons, k_HND = taught
                    lessons.add(self.layer, self._weights(q_THD[at], k_HND[:, :end], seen), scores, seen)
            outs.append(attend(q_THD[at], end, seen))
            begin = end
        return torch.cat(outs) if len(outs) > 1 else outs[0]

    @torch.no_grad()
    def _weights(self, q_THD: Tensor, k_HND: Tensor, seen_TN: Tensor) -> Tensor:
        """What queries give to the keys they see: [T, H, N] fp32."""
        scores = torch.bmm(q_THD.transpose(0, 1), k_HND.transpose(1, 2)).float() * self.spec.scale
        return scores.masked_fill(~seen_TN, -torch.inf).softmax(-1).transpose(0, 1)

    def _absorb(self, q_THD: Tensor, held_ND: Tensor, seen_TN: Tensor) -> Tensor:
        """Many queries of one sequence over its latent rows: [T, H, V]."""
        q = self._over_key(q_THD)
        out = attend_dense(q, [(held_ND, seen_TN)], scale=self.spec.scale, value_width=self.spec.kv_rank)
        return self._by_head(out, self._absorbed()[1])

    def _over_key(self, q_THD: Tensor) -> Tensor:
        """Queries for latent rows: [T, H, R + rope]."""
        q_nope, q_rope = q_THD.split([self.spec.nope_dim, self.spec.rope.dim], -1)
        return torch.cat([self._by_head(q_nope, self._absorbed()[0]), q_rope], -1)

    def _by_head(self, x_THI: Tensor, weight_HOI: Tensor) -> Tensor:
        """[T, H, O]: each head's numbers times its own weight."""
        if self.wo.pad_rows == 1 and kernels.loops_for_few(x_THI, weight_HOI):
            return kernels.product_by_group(x_THI, weight_HOI)
        return matmul(x_THI.transpose(0, 1), weight_HOI.transpose(1, 2)).transpose(0, 1)

    def _expand(self, held_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [H, N, P + rope] and values [H, N, V] of latent rows."""
        spec = self.spec
        latent, key = held_ND.split([spec.kv_rank, spec.rope.dim], -1)
        kv = self.wkv_b(latent).unflatten(-1, (spec.heads, -1)).transpose(0, 1)
        k_nope, v = kv.split([spec.nope_dim, spec.value_dim], -1)
        return torch.cat([k_nope, key.expand(spec.heads, -1, -1)], -1), v

    def _decode(
        self,
        q_BHD: Tensor,
        row_BD: Tensor,
        x_BH: Tensor,
        low_BR: Tensor | None,
        index_key: Tensor | None,
        turns: Tensor,
        step: Step,
        run: tuple[Segment, ...],
    ) -> Tensor:
        """One token of each of B sequences, absorbed: [B, H, V]."""
        layer = self.layer
        numbers = tuple(s.first for s in run)
        step.write(layer, "latent", run, numbers, row_BD)
        q = self._over_key(q_BHD)
        chosen = None
        if self.indexer and index_key is not None and low_BR is not None:
            step.write(layer, "index", run, numbers, index_key)
            if max(s.end for s in run) > self.indexer.spec.top_k:
                chosen = self._choose(low_BR, x_BH, turns, step, run)
        out_BHR = self._over_latents(q, step, run, chosen)
        return self._by_head(out_BHR, self._absorbed()[1])

    def _absorbed(self) -> tuple[Tensor, Tensor]:
        """What queries and outputs are multiplied by, [H, R, P] and [H, V, R].

        Copied from wkv_b once for as long as it stays as it is: a product of slices would copy them at every step.
        What is written through `weight.data` is not seen; tensors of inference mode tell nothing, and are copied anew.
        """
        weight = self.wkv_b.whole()
        if weight.is_inference() or not isinstance(weight, nn.Parameter):
            return self._slices(weight)
        state = (weight.data_ptr(), weight._version)
        if self._copied is None or self._copied[0] is not weight or self._copied[1] != state:
            self._copied = (weight, state, *self._slices(weight.detach()))
        return self._copied[2:]

    def _slices(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        spec = self.spec
        to_key, to_value = weight.unflatten(0, (spec.heads, -1)).split([spec.nope_dim, spec.value_dim], 1)
        return to_key.transpose(1, 2).contiguous(), to_value.contiguous()

    def __getstate__(self) -> dict[str, Any]:
        """Copies and files of the module go without what it has copied of its weights."""
        return self.__dict__ | {"_copied": None}

    def _over_latents(self, q_BHD: Tensor, step: Step, run: tuple[Segment, ...], chosen: Tensor | None) -> Tensor:
        """[B, H, R]: all together where their rows are few, else one sequence after the other, where rows are views."""
        spec, layer = self.spec, self.layer
        pool = step.pool(layer, "latent")
        ends = [s.end for s in run]
        gathered = len(run) * max(ends) * pool.shape[1]
        if pool.dtype == q_BHD.dtype and kernels.loops(q_BHD) and q_BHD.shape[-1] % 32 == spec.kv_rank % 32 == 0:
            slots = step.all(layer, "latent", run) if chosen is None else chosen
            return kernels.attend(
                *(q_BHD, (pool, slots), None), scale=spec.scale, value_width=spec.kv_rank, sink_H=None
            )
        if chosen is not None or (len(run) > 1 and gathered <= _GATHERED_MAX):
            slots = step.all(layer, "latent", run) if chosen is None else chosen
            rows, seen = gather(pool, slots)
            return attend_rows(q_BHD, rows, seen, scale=spec.scale, value_width=spec.kv_rank)
        outs = []
        for i, segment in enumerate(run):
            assert segment.sequence is not None
            held = step.cache.read(layer, step.spec(layer, "latent"), segment.sequence, 0, segment.end)
            q_1HD = q_BHD[i : i + 1]
            outs.append(attend_dense(q_1HD, [(held, None)], scale=spec.scale, value_width=spec.kv_rank))
        return torch.cat(outs) if len(outs) > 1 else outs[0]

    def _choose(self, low_BR: Tensor, x_BH: Tensor, turns: Tensor, step: Step, run: tuple[Segment, ...]) -> Tensor:
        """[B, k]: where the latent rows lie that the indexer chooses."""
        assert self.indexer is not None
        queries, weights = self.indexer.queries(low_BR, turns), self.indexer.weights(x_BH)
        row = step.spec(self.layer, "index")
        chosen = []
        for i, segment in enumerate(run):
            assert segment.sequence is not None
            keys = step.cache.read(self.layer, row, segment.sequence, 0, segment.end)
            visible = torch.full((1,), segment.end, device=keys.device)
            chosen.append(self.indexer.choose(queries[i : i + 1], weights[i : i + 1], keys, visible))
        return step.slots(self.layer, "latent", run, torch.cat(chosen))
