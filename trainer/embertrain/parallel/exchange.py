"""A dispatcher for experts that are spread over ranks: rows go to the rank of their expert, and come back.

Rank i of ep holds the experts from i * E / ep on. Each rank sorts its rows by expert, as `LocalDispatcher` does, so
that those of one rank lie together; two all-to-alls carry first the counts, then the rows. What arrives is put in the
order of expert, then rank, then token: with samples in the order of ranks, that in which one process would have them,
so that the experts' sums have the same terms in the same order. The way back is the reverse, and so are gradients.

E experts in all, R rows, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..model.dispatch import Dispatched, LocalDispatcher
from ..model.router import Routing


@dataclass(frozen=True, slots=True)
class Exchanged(Dispatched):
    """Rows of this rank's experts, from all ranks. `tokens_R` and `places_TK` are those of the rows that were sent."""

    home: Dispatched
    """What was sent."""
    order_R: Tensor
    """int64: which of the rows in the order of arrival each row is."""
    sent: list[int]
    """Rows to each rank."""
    received: list[int]
    """Rows from each rank."""


class ExchangeDispatcher:
    """For the ranks of `group`. All of them call it as often, in the same order."""

    def __init__(self, group: dist.ProcessGroup, physical_E: Tensor | None = None) -> None:
        """`physical_E` as `LocalDispatcher`'s."""
        self.group = group
        self.local = LocalDispatcher(physical_E)

    def dispatch(self, x_TH: Tensor, routing: Routing) -> Exchanged:
        home = self.local.dispatch(x_TH, routing)
        ranks = self.group.size()
        counts_E = torch.tensor(home.counts, device=x_TH.device)
        arriving_E = torch.empty_like(counts_E)
        dist.all_to_all_single(arriving_E, counts_E, group=self.group)
        arriving = arriving_E.view(ranks, -1)
        sent = [sum(home.counts[i : i + arriving.shape[1]]) for i in range(0, len(home.counts), arriving.shape[1])]
        table: list[list[int]] = arriving.tolist()
        received = [sum(row) for row in table]
        order_R = _by_expert(arriving)
        rows_RH: Tensor = _Exchange.apply(home.rows_RH, sent, received, self.group)
        counts = tuple(map(sum, zip(*table, strict=True)))
        rows_RH = _Permute.apply(rows_RH, order_R)
        return Exchanged(rows_RH, counts, home.tokens_R, home.places_TK, home, order_R, sent, received)

    def combine(self, rows_RH: Tensor, routing: Routing, dispatched: Dispatched) -> Tensor:
        assert isinstance(dispatched, Exchanged)
        arrived: Tensor = _Permute.apply(rows_RH, _inverse(dispatched.order_R))
        returned: Tensor = _Exchange.apply(arrived, dispatched.received, dispatched.sent, self.group)
        return self.local.combine(returned, routing, dispatched.home)


def _by_expert(counts: Tensor) -> Tensor:
    """int64 [R]: the places of rows that lie by rank, then expert, in the order of expert, then rank."""
    experts = torch.arange(counts.shape[1], device=counts.device).repeat(counts.shape[0])
    return experts.repeat_interleave(counts.flatten()).sort(stable=True).indices


def _inverse(order_R: Tensor) -> Tensor:
    return torch.empty_like(order_R).index_copy_(0, order_R, torch.arange(len(order_R), device=order_R.device))


class _Exchange(torch.autograd.Function):
    """An all-to-all of rows."""

    @staticmethod
    def forward(ctx: Any, rows_RH: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.counts, ctx.group = (sent, received), group
        out = rows_RH.new_empty(sum(received), rows_RH.shape[1])
        dist.all_to_all_single(out, rows_RH.contiguous(), received, sent, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        sent, received = ctx.counts
        back = grads[0].new_empty(sum(sent), grads[0].shape[1])
        dist.all_to_all_single(back, grads[0].contiguous(), sent, received, group=ctx.group)
        return back, None, None, None


class _Permute(torch.autograd.Function):
    """Rows in another order; index_select's gradient would be sums, which on some devices have no order."""

    @staticmethod
    def forward(ctx: Any, rows_RH: Tensor, order_R: Tensor) -> Tensor:
        ctx.save_for_backward(order_R)
        return rows_RH.index_select(0, order_R)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (order_R,) = ctx.saved_tensors
        return grads[0].index_select(0, _inverse(order_R)), None
