"""The attention core: FlashMLA's meaning, and its dense form.

Shapes and tricks are those of kernels' own tests: unused rows are NaN, indices -1 mean nothing, a query may see no row.
"""

from __future__ import annotations

import pytest
import torch
from embertrain.model.attend import attend, attend_dense, attend_rows, chosen_indices, gather, top_indices, top_k
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor


def by_hand(q: Tensor, rows: Tensor, value_width: int, scale: float, sink: float | None) -> tuple[Tensor, Tensor]:
    """One query and head, in fp64."""
    if not len(rows):
        return torch.zeros(value_width, dtype=torch.float64), torch.tensor(torch.inf, dtype=torch.float64)
    scores = rows.double() @ q.double() * scale
    lse = torch.logsumexp(scores, 0)
    total = lse if sink is None else torch.logaddexp(lse, torch.tensor(sink, dtype=torch.float64))
    return torch.exp(scores - total) @ rows.double()[:, :value_width], lse


@pytest.mark.parametrize("heads", [1, 3, 64])
@pytest.mark.parametrize("queries", [1, 2, 4])
@pytest.mark.parametrize("with_sink", [False, True])
def test_attend_against_fp64(heads: int, queries: int, with_sink: bool) -> None:
    g = torch.Generator().manual_seed(heads * 10 + queries)
    D, V, K, E = 40, 32, 9, 5
    q = torch.randn(queries, heads, D, generator=g)
    pool = torch.full((50, D), torch.nan)
    extra = torch.full((30, D), torch.nan)
    indices = torch.stack([torch.randperm(50, generator=g)[:K] for _ in range(queries)])
    more = torch.stack([torch.randperm(30, generator=g)[:E] for _ in range(queries)])
    indices[:, -2:] = -1
    more[0, :] = -1
    if queries > 1:
        indices[1], more[1] = -1, -1  # sees nothing
    pool[indices[indices >= 0]] = torch.randn(int((indices >= 0).sum()), D, generator=g)
    extra[more[more >= 0]] = torch.randn(int((more >= 0).sum()), D, generator=g)
    sink = torch.randn(heads, generator=g) if with_sink else None
    out, lse = attend(q, pool, indices, scale=0.2, value_width=V, extra_pool=extra, extra_indices=more, sink_H=sink)
    for t in range(queries):
        rows = torch.cat([pool[indices[t][indices[t] >= 0]], extra[more[t][more[t] >= 0]]])
        for h in range(heads):
            want, want_lse = by_hand(q[t, h], rows, V, 0.2, None if sink is None else float(sink[h]))
            torch.testing.assert_close(out[t, h].double(), want, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(lse[t, h].double(), want_lse, atol=1e-5, rtol=1e-5)


def test_the_dense_form_and_the_gathered_one_are_the_same() -> None:
    g = torch.Generator().manual_seed(5)
    T, H, D, N = 6, 4, 24, 20
    q, rows, sink = torch.randn(T, H, D, generator=g), torch.randn(N, D, generator=g), torch.randn(H, generator=g)
    seen = torch.rand(T, N, generator=g) < 0.5
    seen[:, 3] = True
    indices = chosen_indices(seen, N)
    sparse, _ = attend(q, rows, indices, scale=0.3, sink_H=sink)
    dense = attend_dense(q, [(rows[:9], seen[:, :9]), (rows[9:], seen[:, 9:])], scale=0.3, sink_H=sink)
    gathered, mask = gather(rows, indices)
    torch.testing.assert_close(dense, sparse)
    torch.testing.assert_close(attend_rows(q, gathered, mask, scale=0.3, sink_H=sink), sparse)


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 20), st.integers(0, 4), st.randoms(use_true_random=False))
def test_top_k_takes_the_lowest_of_equal_scores(n: int, k: int, levels: int, rng) -> None:  # type: ignore[no-untyped-def]
    scores = torch.tensor([[float(rng.randint(0, levels)) for _ in range(n)] for _ in range(3)])
    visible = torch.tensor([rng.randint(0, n) for _ in range(3)])
    chosen = top_k(scores, visible, k)
    for t in range(3):
        ranked = sorted(range(int(visible[t])), key=lambda s: (-float(scores[t, s]), s))[:k]
        assert chosen[t].nonzero().flatten().tolist() == sorted(ranked)
    # Fewer than k rows may be all there are: indices are padded.
    width = min(k, n)
    assert [row[row >= 0].tolist() for row in chosen_indices(chosen, width)] == [
        row.nonzero().flatten().tolist() for row in chosen
    ]
    assert torch.equal(top_indices(scores, visible, k), chosen_indices(chosen, k))
