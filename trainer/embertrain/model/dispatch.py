"""From tokens to rows of experts and back.

    dispatch:  row r = x[token of assignment r], rows sorted by physical expert, then by token
    combine:   y_t = sum over k of weight_tk * row of (t, k)

A dispatcher keeps nothing between calls: what combine needs is in the `Dispatched` that dispatch gave. Assignments to
expert -1 have no row. Sums run over k in order, so results are the same bits in every run.

Which physical expert (place in the weights) a logical one (number in the router) is, is the dispatcher's to know;
`LocalDispatcher` has all experts in this process.

T tokens, K choices, A = T * K assignments, R rows, E physical experts, H hidden size, M rows of the fullest expert.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import Dropping
from .experts import Part
from .router import Routing


@dataclass(frozen=True, slots=True)
class Dispatched:
    """Rows of experts, and where they came from."""

    rows_RH: Tensor
    counts: tuple[int, ...]
    """Rows of each physical expert, in order; their sum is R."""
    tokens_R: Tensor
    """int64: the token a row is a copy of."""
    places_TK: Tensor
    """int64: the row of each assignment; R where there is none."""
    parts: tuple[Part, ...] = ()
    """Rows that are multiplied by themselves, one part after another; if there are none, all rows are one."""


class Dispatcher(Protocol):
    """What `MoE` needs. Ranks that hold a part of the experts each have another one."""

    def dispatch(self, x_TH: Tensor, routing: Routing) -> Dispatched: ...

    def combine(self, rows_RH: Tensor, routing: Routing, dispatched: Dispatched) -> Tensor:
        """[T, H]: the weighted sums of `rows_RH`, which the experts made of `dispatched.rows_RH`."""
        ...


class LocalDispatcher:
    """All experts are here. `physical_E` says where each logical expert is; None: where its number says."""

    def __init__(self, physical_E: Tensor | None = None) -> None:
        self.physical_E = physical_E

    def dispatch(self, x_TH: Tensor, routing: Routing) -> Dispatched:
        T, K = routing.experts_TK.shape
        E = routing.scores_TE.shape[1]
        experts_A = routing.experts_TK.flatten()
        if self.physical_E is not None:
            experts_A = torch.where(experts_A < 0, experts_A, self.physical_E[experts_A])
        sorted_A, order_A = experts_A.sort(stable=True)
        bounds = torch.searchsorted(sorted_A, torch.arange(E + 1, device=sorted_A.device))
        counts, missing = counts_on_host(bounds)
        R = T * K - missing
        order_R = order_A[missing:]
        tokens_R = torch.div(order_R, K, rounding_mode="floor")
        rows_R = torch.arange(R, device=order_R.device)
        places_A = torch.full_like(order_A, R) if missing else torch.empty_like(order_A)
        places_TK = places_A.index_copy_(0, order_R, rows_R).view(T, K)
        if torch.is_grad_enabled() and x_TH.requires_grad:
            rows_RH: Tensor = _Gather.apply(x_TH, tokens_R, places_TK)
        else:
            rows_RH = x_TH.index_select(0, tokens_R)
        return Dispatched(rows_RH, counts, tokens_R, places_TK)

    def combine(self, rows_RH: Tensor, routing: Routing, dispatched: Dispatched) -> Tensor:
        weights_TK = routing.weights_TK.to(rows_RH.dtype)
        if torch.is_grad_enabled() and (rows_RH.requires_grad or weights_TK.requires_grad):
            y_TH: Tensor = _Combine.apply(rows_RH, weights_TK, dispatched.tokens_R, dispatched.places_TK)
            return y_TH
        return _sums(rows_RH, dispatched.places_TK, weights_TK)


def counts_on_host(bounds: Tensor) -> tuple[tuple[int, ...], int]:
    """Rows of each expert, and assignments without one, of the places in sorted assignments where each expert begins.

    The one place of a layer where the host waits for the device.
    """
    places = bounds.tolist()
    return tuple(after - before for before, after in itertools.pairwise(places)), places[0]


def _sums(rows_RH: Tensor, places_TK: Tensor, weights_TK: Tensor | None) -> Tensor:
    """[T, H]: of each token's rows, in the order of k."""
    if rows_RH.shape[0] != places_TK.numel():
        rows_RH = F.pad(rows_RH, (0, 0, 0, 1))  # Assignments without a row point behind the last one.
    return F.embedding_bag(places_TK, rows_RH, mode="sum", per_sample_weights=weights_TK)


class _Gather(torch.autograd.Function):
    """A copy of x for each row; its gradient is a sum in a fixed order, which index_select's need not be."""

    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, tokens_R: Tensor, places_TK: Tensor) -> Tensor:
        ctx.save_for_backward(places_TK)
        return x_TH.index_select(0, tokens_R)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (places_TK,) = ctx.saved_tensors
        return _sums(grads[0], places_TK, None), None, None


class _Combine(torch.autograd.Function):
    """Weighted sums of rows."""

    @staticmethod
    def forward(ctx: Any, rows_RH: Tensor, weights_TK: Tensor, tokens_R: Tensor, places_TK: Tensor) -> Tensor:
        ctx.save_for_backward(rows_RH, weights_TK, tokens_R, places_TK)
        return _sums(rows_RH, places_TK, weights_TK)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows_RH, weights_TK, tokens_R, places_TK = ctx.saved_tensors
        R = rows_RH.shape[0]
        grads_RH = grads[0].index_select(0, tokens_R)
        # The last place belongs to all assignments without a row.
        products = F.pad(torch.linalg.vecdot(rows_RH, grads_RH), (0, 1))
        weights_R = weights_TK.new_empty(R + 1).index_copy_(0, places_TK.flatten(), weights_TK.flatten())[:R]
        return grads_RH.mul_(weights_R[:, None]), products[places_TK], None, None


# ---- rows of equal number for every expert


def to_padded(rows_RH: Tensor, counts: tuple[int, ...]) -> Tensor:
    """[E, M, H]: the rows of each expert, then zeros."""
    return torch.nn.utils.rnn.pad_sequence(list(rows_RH.split(counts)), batch_first=True)


def from_padded(rows_EMH: Tensor, counts: tuple[int, ...]) -> Tensor:
    """[R, H]: the reverse."""
    return torch.cat([rows_MH[:n] for rows_MH, n in zip(rows_EMH, counts, strict=True)])


# ---- experts of bounded room


def capacity(dropping: Dropping, tokens: int, top_k: int, experts: int) -> int:
    """Rows an expert has room for, of a batch of `tokens` (arXiv 2006.16668 section 2.2)."""
    return max(dropping.min_capacity, math.ceil(dropping.capacity_factor * tokens * top_k / experts))


@torch.no_grad()
def overflow(experts_TK: Tensor, weights_TK: Tensor, room: int) -> Tensor:
    """[T, K] bool: assignments that find no room in their expert, where those of greater weight come first, then those
    of earlier tokens."""
    experts_A = experts_TK.flatten()
    by_weight = weights_TK.flatten().sort(descending=True, stable=True).indices
    sorted_A, then = experts_A[by_weight].sort(stable=True)
    order_A = by_weight[then]
    rank_A = torch.arange(len(order_A), device=order_A.device) - torch.searchsorted(sorted_A, sorted_A)
    late_A = (rank_A >= room) & (sorted_A >= 0)
    return torch.empty_like(late_A).index_copy_(0, order_A, late_A).view_as(experts_TK)


def drop(routing: Routing, dropping: Dropping) -> Routing:
    """The routing without what finds no room. Weights of the rest stay as they are: a dropped expert adds nothing."""
    T, K = routing.experts_TK.shape
    room = capacity(dropping, T, K, routing.scores_TE.shape[1])
    late_TK = overflow(routing.experts_TK, routing.weights_TK, room)
    experts_TK = routing.experts_TK.masked_fill(late_TK, -1)
    return replace(routing, experts_TK=experts_TK, weights_TK=routing.weights_TK.masked_fill(late_TK, 0.0))
