"""Rows to experts and back, and what happens to those without room. Run: pytest tests/trainer/test_dispatch.py."""

from __future__ import annotations

import pytest
import torch
from embertrain.model.batch import Batch
from embertrain.model.config import Dropping
from embertrain.model.dispatch import LocalDispatcher, capacity, drop, from_padded, overflow, to_padded
from embertrain.model.router import Routing
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

E, H = 6, 8


def routing_of(experts: Tensor, weights: Tensor) -> Routing:
    T = len(experts)
    return Routing(experts, weights, torch.zeros(T, E), experts, Batch.of([(0, T)]))


def random_routing(T: int, K: int, seed: int, *, first: int = -1) -> tuple[Tensor, Routing]:
    g = torch.Generator().manual_seed(seed)
    experts = torch.randint(first, E, (T, K), generator=g)
    weights = torch.rand(T, K, generator=g).masked_fill(experts < 0, 0)
    return torch.randn(T, H, generator=g), routing_of(experts, weights)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 9), st.integers(1, 4), st.integers(0, 10**6), st.sampled_from([-1, 0]), st.booleans())
def test_rows_are_sorted_by_expert_and_come_back(T: int, K: int, seed: int, first: int, moved: bool) -> None:
    x, routing = random_routing(T, K, seed, first=first)
    physical = torch.randperm(E, generator=torch.Generator().manual_seed(seed)) if moved else torch.arange(E)
    dispatcher = LocalDispatcher(physical if moved else None)
    sent = dispatcher.dispatch(x, routing)
    expected = sorted((int(physical[e]), t) for t in range(T) for e in routing.experts_TK[t].tolist() if e >= 0)
    assert [t for _, t in expected] == sent.tokens_R.tolist()
    assert sent.counts == tuple(sum(e == p for p, _ in expected) for e in range(E))
    assert torch.equal(sent.rows_RH, x[sent.tokens_R])
    assert torch.equal(from_padded(to_padded(sent.rows_RH, sent.counts), sent.counts), sent.rows_RH)
    y = dispatcher.combine(2 * sent.rows_RH, routing, sent)
    torch.testing.assert_close(y, 2 * x * routing.weights_TK.sum(-1, keepdim=True))


@pytest.mark.parametrize("first", [-1, 0])
def test_gradients_of_dispatch_and_combine(first: int) -> None:
    x, routing = random_routing(7, 3, 5, first=first)
    dispatcher = LocalDispatcher()
    scale = torch.randn(7 * 3, H, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def there_and_back(x_TH: Tensor, weights_TK: Tensor) -> Tensor:
        there = routing_of(routing.experts_TK, weights_TK)
        sent = dispatcher.dispatch(x_TH, there)
        return dispatcher.combine(sent.rows_RH * scale[: len(sent.rows_RH)], there, sent)

    x64, w64 = x.double().requires_grad_(), routing.weights_TK.double().requires_grad_()
    out = there_and_back(x64, w64)
    grad = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    got = torch.autograd.grad(out, (x64, w64), grad)
    sent = dispatcher.dispatch(x64, routing)
    naive = torch.zeros_like(x64)
    for t in range(7):
        for k in range(3):
            if routing.experts_TK[t, k] >= 0:
                naive = naive.index_add(0, torch.tensor([t]), (w64[t, k] * x64[t] * scale[sent.places_TK[t, k]])[None])
    want = torch.autograd.grad(naive, (x64, w64), grad)
    torch.testing.assert_close(out, naive)
    torch.testing.assert_close(got[0], want[0])
    # The sums of a weight's gradient are made in fp32.
    torch.testing.assert_close(got[1], want[1], atol=1e-5, rtol=1e-5)


def test_a_token_without_experts_gets_nothing() -> None:
    x, _ = random_routing(2, 2, 0)
    routing = routing_of(torch.full((2, 2), -1), torch.zeros(2, 2))
    sent = LocalDispatcher().dispatch(x, routing)
    assert sent.rows_RH.shape == (0, H) and sum(sent.counts) == 0
    assert not LocalDispatcher().combine(sent.rows_RH, routing, sent).any()


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 12), st.integers(1, 3), st.integers(1, 5), st.integers(0, 10**6))
def test_the_least_wanted_are_dropped(T: int, K: int, room: int, seed: int) -> None:
    _, routing = random_routing(T, K, seed)
    late = overflow(routing.experts_TK, routing.weights_TK, room)
    for expert in range(E):
        places = [(t, k) for t in range(T) for k in range(K) if routing.experts_TK[t, k] == expert]
        ranked = sorted(places, key=lambda p: (-float(routing.weights_TK[p]), p))
        assert [bool(late[p]) for p in ranked] == [i >= room for i in range(len(ranked))]
    assert not late[routing.experts_TK < 0].any()


def test_dropped_assignments_add_nothing_and_are_told() -> None:
    x, routing = random_routing(64, 2, 3, first=0)
    dropping = Dropping(capacity_factor=0.5, min_capacity=4)
    assert capacity(dropping, 64, 2, E) == 11 and capacity(dropping, 3, 2, E) == 4
    dropped = drop(routing, dropping)
    counts = torch.bincount(routing.experts_TK.flatten(), minlength=E)
    assert torch.equal(dropped.counts_E, counts)
    assert torch.equal(dropped.dropped_E, (counts - 11).clamp_min(0))
    assert torch.equal(dropped.weights_TK == 0, dropped.experts_TK < 0)
    sent = LocalDispatcher().dispatch(x, dropped)
    y = LocalDispatcher().combine(sent.rows_RH, dropped, sent)
    torch.testing.assert_close(y, x * dropped.weights_TK.sum(-1, keepdim=True))
    # A replayed choice is not dropped twice.
    assert torch.equal(drop(dropped, dropping).experts_TK, dropped.experts_TK)
