"""The mixture of experts: a router, its experts, and the shared expert that every token goes through."""

from __future__ import annotations

from torch import Tensor, nn

from .batch import Batch
from .config import Mixture
from .experts import Experts, Shared
from .router import Router, Routing


class MoE(nn.Module):
    """The feed-forward part of a layer with experts."""

    def __init__(self, spec: Mixture, hidden_size: int, vocab_size: int) -> None:
        super().__init__()
        self.gate = Router(spec, hidden_size, vocab_size)
        self.experts = Experts(spec, hidden_size)
        self.shared = Shared(hidden_size, spec.inner_size * spec.shared) if spec.shared else None

    def forward(
        self, x_TH: Tensor, ids_T: Tensor, batch: Batch, *, selection_TK: Tensor | None = None
    ) -> tuple[Tensor, Routing]:
        """[T, H] -> [T, H], and how the tokens were routed."""
        routing: Routing = self.gate(x_TH, ids_T, batch, selection_TK=selection_TK)
        y_TH = self.experts(x_TH, routing.experts_TK, routing.weights_TK)
        return y_TH if self.shared is None else y_TH + self.shared(x_TH), routing
