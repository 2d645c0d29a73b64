"""The product that experts are made of is the formula, whatever library does it, and a row's bits do not depend on
what is multiplied with it when rows come in eights."""

from __future__ import annotations

import pytest
import torch
from embertrain.kernels.products import linear, linear_into
from embertrain.model.experts import grouped_linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("M", "K", "N"), [(1, 7, 5), (8, 64, 48), (33, 256, 17)])
def test_views_of_all_kinds_are_multiplied(dtype: torch.dtype, M: int, K: int, N: int) -> None:
    g = torch.Generator().manual_seed(M)
    x, w = torch.randn(M, K, generator=g).to(dtype), torch.randn(N, K, generator=g).to(dtype)
    exact = (x.double() @ w.double().t()).float()
    tolerance = {"atol": 1e-4, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 1e-2, "rtol": 1e-2}
    for a in (x, x.t().contiguous().t(), torch.cat([x, x], 1)[:, :K]):
        for b in (w, w.t().contiguous().t()):
            torch.testing.assert_close(linear(a, b).float(), exact, **tolerance)
            # The middle of a larger tensor: what lies beside it stays.
            out = torch.full((M + 2, N), 7.0, dtype=dtype)
            linear_into(out[1:-1], a, b)
            torch.testing.assert_close(out[1:-1].float(), exact, **tolerance)
            assert bool((out[[0, -1]] == 7).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("width", "out"), [(512, 256), (48, 24), (33, 17)])
def test_a_row_alone_has_the_bits_it_has_among_others(dtype: torch.dtype, width: int, out: int) -> None:
    g = torch.Generator().manual_seed(1)
    weights = torch.randn(3, out, width, generator=g).to(dtype)
    rows = torch.randn(40, width, generator=g).to(dtype)
    for n in (2, 7, 8, 9, 40):
        among = grouped_linear(torch.cat([rows[:n], rows[:3]]), weights, (n, 0, 3), 8)
        for row in (0, n - 1):
            assert torch.equal(grouped_linear(rows[row : row + 1], weights, (1, 0, 0), 8)[0], among[row])
