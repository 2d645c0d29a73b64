"""A dispatcher for experts that are spread over ranks: rows go to the rank of their expert, and come back.

Rank i of ep holds the experts from i * E / ep on. Each rank sorts its rows by expert, as `LocalDispatcher` does, so
that those of one rank lie together; two all-to-alls carry first the counts, then the rows. What arrives is put in the
order of expert, then rank, then token: with samples in the order of ranks, that in which one process would have them,
so that the experts' sums have the same terms in the same order. The way back is the reverse, and so are gradients.

Or rows stay apart by the rank they are from, in that rank's order, and experts multiply those of each by themselves.
They then have the bits that they would have on that rank, if it had all experts.

E experts in all, R rows, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..model.dispatch import Dispatched, LocalDispatcher
from ..model.experts import Part
from ..model.router import Routing


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchanged(Dispatched):
    """Rows of this rank's experts, from all ranks. `tokens_R` and `places_TK` are those of the rows that were sent."""

    home: Dispatched
    """What was sent."""
    order_R: Tensor | None
    """int64: which of the rows in the order of arrival each row is; None: they are in that order."""
    sent: list[int]
    """Rows to each rank."""
    received: list[int]
    """Rows from each rank."""


class ExchangeDispatcher:
    """For the ranks of `group`. All of them call it as often, in the same order."""

    def __init__(self, group: dist.ProcessGroup, physical_E: Tensor | None = None, *, apart: bool = False) -> None:
        """`physical_E` as `LocalDispatcher`'s; `apart`: rows stay apart by rank."""
        self.group, self.apart = group, apart
        self.local = LocalDispatcher(physical_E)

    def dispatch(self, x_TH: Tensor, routing: Routing) -> Exchanged:
        home = self.local.dispatch(x_TH, routing)
        each = len(home.counts) // self.group.size()
        here = [home.counts[i : i + each] for i in range(0, len(home.counts), each)]
        # Each rank learns how many rows come for each of its experts, and how many the sender's fullest one has.
        telling = torch.tensor([(*counts, max(home.counts)) for counts in here], device=x_TH.device)
        told = torch.empty_like(telling)
        dist.all_to_all_single(told, telling, group=self.group)
        parts = tuple(Part(tuple(row[:-1]), row[-1]) for row in told.tolist())
        sent, received = [sum(counts) for counts in here], [sum(part.counts) for part in parts]
        rows_RH: Tensor = _Exchange.apply(home.rows_RH, sent, received, self.group)
        order_R = None if self.apart else _by_expert(told[:, :-1])
        return Exchanged(
            rows_RH=rows_RH if order_R is None else _Permute.apply(rows_RH, order_R),
            counts=tuple(map(sum, zip(*(part.counts for part in parts), strict=True))),
            tokens_R=home.tokens_R,
            places_TK=home.places_TK,
            parts=parts if self.apart else (),
            home=home,
            order_R=order_R,
            sent=sent,
            received=received,
        )

    def combine(self, rows_RH: Tensor, routing: Routing, dispatched: Dispatched) -> Tensor:
        assert isinstance(dispatched, Exchanged)
        if dispatched.order_R is not None:
            rows_RH = _Permute.apply(rows_RH, _inverse(dispatched.order_R))
        returned: Tensor = _Exchange.apply(rows_RH, dispatched.received, dispatched.sent, self.group)
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
