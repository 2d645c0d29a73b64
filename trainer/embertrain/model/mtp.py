"""Multi-token prediction: one more layer that guesses the token after the next.

It reads the residual h_t of the model (or of the MTP layer before it) and the embedding of token t + 1, each normalised
and joined: V3 projects their concatenation, V4 adds two projections, the embedding's to all streams. Embedding and head
are the model's own. (arXiv 2412.19437 section 2.2; 2606.19348 section 2.4)
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..cache.step import Rows
from .batch import Batch
from .config import Layer, ModelConfig
from .hyper import HyperHead
from .layer import Block
from .linear import Linear
from .norm import RMSNorm
from .rope import Angles
from .router import Routing


class MTPBlock(Block):
    """MTP layer `index - len(config.layers)`; its rows in a cache are layer `index`'s."""

    def __init__(self, config: ModelConfig, layer: Layer, index: int) -> None:
        super().__init__(config, layer, index)
        H, eps = config.hidden_size, config.rms_eps
        self.enorm = RMSNorm(H, eps)
        self.hnorm = RMSNorm(H, eps)
        self.norm = RMSNorm(H, eps)
        self.hc_head: HyperHead | None = None
        if config.hyper is None:
            self.eh_proj = Linear(2 * H, H)
        else:
            self.e_proj = Linear(H, H)
            self.h_proj = Linear(H, H)
            self.hc_head = HyperHead(config.hyper, H, eps)

    def predict(
        self,
        embedded_TH: Tensor,
        h: Tensor,
        ids_T: Tensor,
        batch: Batch,
        rows: Rows,
        angles: Angles,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor, Routing | None]:
        """Rows for the head [T, H], this layer's residual, and its routing.

        `embedded_TH` and `ids_T` are those of the tokens after the positions that `batch` names.
        """
        e = self.enorm(embedded_TH)
        if self.hc_head is None:
            x = self.eh_proj(torch.cat([e, self.hnorm(h)], -1))
        else:
            x = self.e_proj(e)[:, None] + self.h_proj(self.hnorm(h).flatten(0, 1)).view_as(h)
        x, routing = self(x, ids_T, batch, rows, angles, None, generator)
        return self.final(x), x, routing

    def final(self, x: Tensor) -> Tensor:
        """Rows for the head of this layer's residual: [T, H]."""
        return self.norm(x if self.hc_head is None else self.hc_head(x))
