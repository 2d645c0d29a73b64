"""The router: scores, choices, weights, tables, losses and loads. Run: pytest tests/trainer/test_router.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from embertrain.errors import ConfigError
from embertrain.model.batch import Batch
from embertrain.model.config import Mixture
from embertrain.model.router import Router, Routing, balanced_table, load, update_bias
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor


def router_of(seed: int = 0, **options: Any) -> Router:
    spec = Mixture(**{"experts": 8, "top_k": 3, "inner_size": 4, **options})
    router = Router(spec, 16, 50)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        router.weight.normal_(0, 0.3, generator=g)
        if spec.hashed:
            router.reset_table(g)
        else:
            router.bias.normal_(0, 0.1, generator=g)
    return router


def inputs(T: int = 40, seed: int = 1) -> tuple[Tensor, Tensor, Batch]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(T, 16, generator=g), torch.randint(0, 50, (T,), generator=g), Batch.of([(0, T)])


def test_equal_scores_go_to_the_lowest_expert() -> None:
    router = router_of(groups=4, groups_kept=2)
    with torch.no_grad():
        router.weight.zero_()
        router.bias.zero_()
    assert router(*inputs()).experts_TK.tolist() == [[0, 1, 2]] * 40


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 4), min_size=12, max_size=12), st.sampled_from([(1, 1), (4, 2), (3, 2), (12, 5)]))
def test_the_choice_is_the_best_of_the_best_groups(levels: list[int], groups: tuple[int, int]) -> None:
    count, kept = groups
    router = router_of(experts=12, top_k=4, groups=count, groups_kept=kept)
    with torch.no_grad():
        router.bias.zero_()
    size = 12 // count
    worth = [sum(sorted(levels[g * size : (g + 1) * size])[-2:]) for g in range(count)]
    best = sorted(range(count), key=lambda g: (-worth[g], g))[:kept]
    allowed = [e for e in range(12) if e // size in best]
    expected = sorted(allowed, key=lambda e: (-levels[e], e))[:4]
    assert router.choose(torch.tensor([levels], dtype=torch.float32)).tolist() == [expected]


@pytest.mark.parametrize("scoring", ["sqrtsoftplus", "sigmoid", "softmax"])
@pytest.mark.parametrize("normalise", [True, False])
def test_weights_come_from_scores_without_bias(scoring: str, normalise: bool) -> None:
    router = router_of(scoring=scoring, normalise=normalise, scale=2.5, temperature=0.7)
    x, ids, batch = inputs()
    routing = router(x, ids, batch)
    logits = x @ router.weight.T / 0.7
    scores = {
        "sqrtsoftplus": torch.log1p(logits.exp()).sqrt(),
        "sigmoid": 1 / (1 + (-logits).exp()),
        "softmax": logits.exp() / logits.exp().sum(-1, keepdim=True),
    }[scoring]
    torch.testing.assert_close(routing.scores_TE, scores)
    for t in range(40):
        ranked = sorted(range(8), key=lambda e: -float(scores[t, e].detach() + router.bias[e]))[:3]
        assert routing.experts_TK[t].tolist() == ranked
        weights = scores[t, ranked]
        torch.testing.assert_close(routing.weights_TK[t], 2.5 * (weights / weights.sum() if normalise else weights))


def test_a_replayed_selection_still_teaches_the_router() -> None:
    router = router_of()
    x, ids, batch = inputs()
    own = router(x, ids, batch)
    again = router(x, ids, batch, selection_TK=own.experts_TK)
    assert torch.equal(own.weights_TK, again.weights_TK)
    partly = own.experts_TK.clone()
    partly[:, 1] = -1
    routing = router(x, ids, batch, selection_TK=partly)
    assert not routing.weights_TK[:, 1].any()
    torch.testing.assert_close(routing.weights_TK.sum(-1), torch.ones(40))
    (routing.weights_TK[:, 0] ** 2).sum().backward()
    assert router.weight.grad is not None
    assert float(router.weight.grad.abs().max()) > 0


def test_top_p_keeps_the_fewest_that_reach_it() -> None:
    router = router_of(top_p=0.6, scoring="softmax")
    x, ids, batch = inputs()
    routing = router(x, ids, batch)
    whole = router_of(scoring="softmax")(x, ids, batch)
    sizes = set()
    for t in range(40):
        scores = {int(e): float(whole.scores_TE[t, e].detach()) for e in whole.experts_TK[t]}
        kept, reached = set(), 0.0
        for e in sorted(scores, key=lambda e: -scores[e]):
            if reached < 0.6 * sum(scores.values()):
                kept.add(e)
                reached += scores[e]
        assert {int(e) for e in routing.experts_TK[t] if e >= 0} == kept
        sizes.add(len(kept))
    assert len(sizes) > 1
    torch.testing.assert_close(routing.weights_TK.sum(-1), torch.ones(40))
    assert int(routing.counts_E.sum()) == int((routing.experts_TK >= 0).sum())


def test_noise_is_of_training_and_of_its_seed() -> None:
    router = router_of(noise=1.0)
    x, ids, batch = inputs()

    def chosen(seed: int) -> Routing:
        routing: Routing = router(x, ids, batch, generator=torch.Generator().manual_seed(seed))
        return routing

    assert torch.equal(chosen(0).experts_TK, chosen(0).experts_TK)
    assert not torch.equal(chosen(0).experts_TK, chosen(1).experts_TK)
    # Weights are those of the scores without noise.
    again = router(x, ids, batch, selection_TK=chosen(0).experts_TK)
    assert torch.equal(again.weights_TK, chosen(0).weights_TK)
    with pytest.raises(ConfigError, match="noise needs a generator"):
        router(x, ids, batch)
    router.eval()
    assert torch.equal(router(x, ids, batch).experts_TK, router_of()(x, ids, batch).experts_TK)


def test_the_balance_loss_against_its_formula() -> None:
    router = router_of()
    x, ids, _ = inputs()
    batch = Batch.of([(0, 25), (0, 14), (0, 1)])
    routing = router(x, ids, batch)
    total = torch.zeros(())
    for segment in batch.segments:
        rows = slice(segment.start, segment.start + segment.count)
        shares = routing.scores_TE[rows] / routing.scores_TE[rows].sum(-1, keepdim=True)
        f = torch.bincount(routing.experts_TK[rows].flatten(), minlength=8) * 8 / (3 * segment.count)
        total = total + (f * shares.mean(0)).sum() * segment.count / 40
    torch.testing.assert_close(routing.balance_loss, total)
    routing.balance_loss.backward()
    assert float(router.weight.grad.abs().max()) > 0


@pytest.mark.parametrize("scoring", ["sqrtsoftplus", "sigmoid", "softmax"])
def test_losses_and_gradients_are_finite_when_scores_vanish(scoring: str) -> None:
    router = router_of(scoring=scoring)
    with torch.no_grad():
        router.weight.fill_(-1e3)
        router.weight[0] = 1e3
    x, ids, batch = inputs()
    routing = router(x.abs(), ids, batch)
    (routing.balance_loss + (routing.weights_TK**2).sum()).backward()
    assert torch.isfinite(routing.balance_loss)
    assert torch.isfinite(router.weight.grad).all()


def test_the_bias_evens_the_load_and_only_when_told() -> None:
    router = router_of(scoring="sigmoid")
    with torch.no_grad():
        router.bias.zero_()
        router.bias[0] = 1.0
    x, ids, batch = inputs(400)
    before = router.bias.clone()
    first = load(router(x, ids, batch).counts_E)
    assert torch.equal(router.bias, before)
    update_bias(router, torch.tensor([9, 1, 5, 5, 5, 5, 5, 5]), 0.25)
    torch.testing.assert_close(router.bias - before, torch.tensor([-0.25, 0.25, 0, 0, 0, 0, 0, 0]))
    for _ in range(200):
        update_bias(router, router(x, ids, batch).counts_E, 0.01)
    last = load(router(x, ids, batch).counts_E)
    assert last.max_over_mean < 1.3 < 2 < first.max_over_mean
    assert load(torch.tensor([0, 4, 0, 4])).idle == 2
    assert load(torch.zeros(4, dtype=torch.int64)).max_over_mean == 0


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 24), st.integers(1, 24), st.integers(1, 90), st.booleans())
def test_a_table_gives_each_expert_the_same_share(E: int, K: int, V: int, ranked: bool) -> None:
    if K > E:
        E, K = K, E
    spec = Mixture(experts=E, top_k=K, inner_size=4, hashed=True)
    frequency = torch.arange(V) if ranked else None
    table = balanced_table(spec, V, torch.Generator().manual_seed(V), frequency)
    assert table.dtype == torch.int32 and table.shape == (V, K)
    assert all(len(set(row)) == K for row in table.tolist())
    counts = torch.bincount(table.flatten(), minlength=E)
    assert int(counts.max() - counts.min()) <= 1
    if ranked:  # So are the most frequent ones among themselves.
        counts = torch.bincount(table[-(V // 2 + 1) :].flatten(), minlength=E)
        assert int(counts.max() - counts.min()) <= 1


def test_hashed_layers_choose_by_token_alone() -> None:
    router = router_of(hashed=True)
    x, ids, batch = inputs()
    routing = router(x, ids, batch)
    assert torch.equal(routing.experts_TK, router.tid2eid[ids].long())
    assert torch.equal(router(-x, ids, batch).experts_TK, routing.experts_TK)
    assert not torch.equal(router(-x, ids, batch).weights_TK, routing.weights_TK)
