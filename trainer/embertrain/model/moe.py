"""The mixture of experts: route -> dispatch -> experts -> combine, and the shared expert that every token goes through.

Nothing is kept between the four stages but what one hands to the next, so that a schedule may run them apart, or those
of two batches in turn. Where the experts are is the dispatcher's affair.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .batch import Batch
from .config import Mixture
from .dispatch import Dispatcher, LocalDispatcher, drop
from .experts import Experts, Shared
from .router import Router, Routing


class MoE(nn.Module):
    """The feed-forward part of a layer with experts. Its stages: `route`, `dispatcher.dispatch`, `experts`,
    `dispatcher.combine`.

    `dispatcher` is that of calls that name none; None: `LocalDispatcher`. Whoever spreads experts over ranks sets it.
    """

    def __init__(self, spec: Mixture, hidden_size: int, vocab_size: int) -> None:
        super().__init__()
        self.gate = Router(spec, hidden_size, vocab_size)
        self.experts = Experts(spec, hidden_size)
        self.shared = Shared(hidden_size, spec.inner_size * spec.shared) if spec.shared else None
        self.dispatcher: Dispatcher | None = None

    def forward(
        self,
        x_TH: Tensor,
        ids_T: Tensor,
        batch: Batch,
        *,
        selection_TK: Tensor | None = None,
        dispatcher: Dispatcher | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Routing]:
        """[T, H] -> [T, H], and how the tokens were routed. `selection_TK` and `generator` as in `Router.forward`."""
        dispatcher = dispatcher or self.dispatcher
        routing = self.route(x_TH, ids_T, batch, selection_TK=selection_TK, generator=generator)
        y_TH = mix(x_TH, routing, self.experts, dispatcher)
        return y_TH if self.shared is None else y_TH + self.shared(x_TH), routing

    def route(
        self,
        x_TH: Tensor,
        ids_T: Tensor,
        batch: Batch,
        *,
        selection_TK: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Routing:
        """Where tokens go, after those that find no room were dropped."""
        routing: Routing = self.gate(x_TH, ids_T, batch, selection_TK=selection_TK, generator=generator)
        dropping = self.gate.spec.dropping
        return routing if dropping is None else drop(routing, dropping)


def mix(x_TH: Tensor, routing: Routing, experts: Experts, dispatcher: Dispatcher | None = None) -> Tensor:
    """[T, H]: dispatch, experts and combine; at once where all is here and that is faster."""
    if dispatcher is None:
        y_TH = experts.few(x_TH, routing.experts_TK, routing.weights_TK)
        if y_TH is not None:
            return y_TH
        dispatcher = LocalDispatcher()
    dispatched = dispatcher.dispatch(x_TH, routing)
    rows_RH = experts(dispatched.rows_RH, dispatched.counts, dispatched.parts)
    return dispatcher.combine(rows_RH, routing, dispatched)
