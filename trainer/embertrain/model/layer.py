"""One layer, in stages that can be called one by one: attention, then routing, dispatch, experts and combination.

V3's residual is one stream: x + block(norm(x)). V4's is several, which a `HyperConnection` collapses for the block and
mixes afterwards.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..cache.step import Rows
from .batch import Batch
from .config import Dense, Hybrid, Hyper, Layer, ModelConfig
from .experts import Shared
from .hybrid import HybridAttention
from .hyper import HyperConnection, expand
from .latent import LatentAttention
from .moe import MoE
from .norm import RMSNorm
from .rope import Angles
from .router import Routing


class Block(nn.Module):
    """Layer `index` of a model: what the residual goes through."""

    def __init__(self, config: ModelConfig, layer: Layer, index: int) -> None:
        super().__init__()
        H, eps = config.hidden_size, config.rms_eps
        self.index = index
        if isinstance(layer.attention, Hybrid):
            self.attn: HybridAttention | LatentAttention = HybridAttention(layer.attention, H, index, eps)
        else:
            self.attn = LatentAttention(layer.attention, H, index, eps)
        if isinstance(layer.ffn, Dense):
            self.ffn: Shared | MoE = Shared(H, layer.ffn.inner_size)
        else:
            self.ffn = MoE(layer.ffn, H, config.vocab_size)
        self.attn_norm = RMSNorm(H, eps)
        self.ffn_norm = RMSNorm(H, eps)
        self.hc_attn = _connection(config.hyper, H, eps)
        self.hc_ffn = _connection(config.hyper, H, eps)

    def forward(
        self,
        x: Tensor,
        ids_T: Tensor,
        batch: Batch,
        rows: Rows,
        angles: Angles,
        selection_TK: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Routing | None]:
        """The residual after the layer, and how tokens were routed (None: the layer has no experts)."""
        return self.feed(self.attend(x, rows, angles), ids_T, batch, selection_TK, generator)

    def attend(self, x: Tensor, rows: Rows, angles: Angles) -> Tensor:
        """The residual after attention: [T, H], or [T, S, H] of streams."""
        if self.hc_attn is None:
            return x + self.attn(self.attn_norm(x), rows, angles)
        y, post, comb = self.hc_attn(x)
        return expand(self.attn(self.attn_norm(y), rows, angles), post, comb, x)

    def feed(
        self,
        x: Tensor,
        ids_T: Tensor,
        batch: Batch,
        selection_TK: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Routing | None]:
        """The residual after the feed-forward part."""

        def block(y_TH: Tensor) -> tuple[Tensor, Routing | None]:
            if isinstance(self.ffn, MoE):
                return self.ffn(y_TH, ids_T, batch, selection_TK=selection_TK, generator=generator)
            return self.ffn(y_TH), None

        if self.hc_ffn is None:
            y, routing = block(self.ffn_norm(x))
            return x + y, routing
        y, post, comb = self.hc_ffn(x)
        y, routing = block(self.ffn_norm(y))
        return expand(y, post, comb, x), routing


def _connection(hyper: Hyper | None, hidden_size: int, eps: float) -> HyperConnection | None:
    return HyperConnection(hyper, hidden_size, eps) if hyper else None


def streams(x_TH: Tensor, hyper: Hyper | None) -> Tensor:
    """The residual a model begins with: the embedding, once per stream."""
    return x_TH if hyper is None else x_TH[:, None].expand(-1, hyper.streams, -1).contiguous()


def finite(x: Tensor) -> bool:
    """Whether all numbers are finite. Waits for the device."""
    return bool(torch.isfinite(x).all())
