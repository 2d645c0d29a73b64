"""The lightning indexer: which rows a query attends to.

    score(t, s) = sum over heads h of w_th * relu(q_th . k_s) * dim**-0.5 * heads**-0.5

and the top_k rows by it, of equal ones the lowest. V4's keys are compressed entries of their own (`Compressed`), V3.2's
one a token (`TokenIndexer`). What DeepSeek does besides, a Hadamard rotation and fewer bits, changes scores by rounding
only. A query that sees at most top_k rows takes them all, and is not scored. (arXiv 2512.02556 section 2.1; 2606.19348
section 2.3.1)

T queries, N keys, h heads, d key width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..kernels.products import matmul, matmul_into
from .attend import BLOCK, SCORES_MAX, top_indices
from .compressor import Compressor
from .config import Index, Rope
from .linear import Linear
from .rope import rotate, rotate_halves


class _Indexer(nn.Module):
    def __init__(self, spec: Index, hidden_size: int, q_rank: int, rope: Rope) -> None:
        super().__init__()
        self.spec, self.rope = spec, rope
        self.wq_b = Linear(q_rank, spec.heads * spec.dim)
        self.weights_proj = Linear(hidden_size, spec.heads)

    def choose(self, q_Thd: Tensor, w_Th: Tensor, keys_Nd: Tensor, visible_T: Tensor) -> Tensor:
        """[T, top_k] int64: the keys each query attends to, of its first `visible`; then -1."""
        return top_indices(self.scores(q_Thd, w_Th, keys_Nd), visible_T, self.spec.top_k)

    def weights(self, x_TH: Tensor) -> Tensor:
        """[T, h] fp32, both scales in it."""
        return self.weights_proj(x_TH).float() * (self.spec.heads**-0.5 * self.spec.dim**-0.5)

    def scores(self, q_Thd: Tensor, w_Th: Tensor, keys_Nd: Tensor) -> Tensor:
        """[T, N] fp32. Keys are taken some at a time, always the same some: what a head says of all would be large."""
        count = max(1, SCORES_MAX // (BLOCK * self.spec.heads))
        queries, out = q_Thd.flatten(0, 1), []
        # In one piece of memory: the last some are fewer, and what is asked for in many sizes ends up in pieces.
        held = None if torch.is_grad_enabled() else queries.new_empty(len(queries) * min(count, len(keys_Nd)))
        for keys in keys_Nd.split(count):
            said = matmul(queries, keys.t()) if held is None else matmul_into(held, queries, keys.t())
            each = said.relu_().float().unflatten(0, q_Thd.shape[:2])
            out.append(torch.bmm(w_Th[:, None], each)[:, 0])
        return torch.cat(out, -1) if len(out) > 1 else out[0]


class CompressedIndexer(_Indexer):
    """V4's: keys are entries of a compressor of its own."""

    def __init__(self, spec: Index, hidden_size: int, q_rank: int, *, ratio: int, rope: Rope, eps: float) -> None:
        super().__init__(spec, hidden_size, q_rank, rope)
        self.compressor = Compressor(
            hidden_size, spec.dim, ratio, rope=rope, eps=eps, kind="index", state_kind="index_state"
        )

    def queries(self, latent_TR: Tensor, turns: Tensor) -> Tensor:
        return rotate(self.wq_b(latent_TR).unflatten(-1, (self.spec.heads, -1)), turns)


class TokenIndexer(_Indexer):
    """V3.2's: one key a token, and rotations of the first numbers, paired by halves."""

    def __init__(self, spec: Index, hidden_size: int, q_rank: int, rope: Rope) -> None:
        super().__init__(spec, hidden_size, q_rank, rope)
        self.wk = Linear(hidden_size, spec.dim)
        self.k_norm = nn.LayerNorm(spec.dim, eps=1e-6)

    def queries(self, latent_TR: Tensor, turns: Tensor) -> Tensor:
        return rotate_halves(self.wq_b(latent_TR).unflatten(-1, (self.spec.heads, -1)), turns[:, None])

    def keys(self, x_TH: Tensor, turns: Tensor) -> Tensor:
        return rotate_halves(self.k_norm(self.wk(x_TH).float()).to(x_TH.dtype), turns)
