"""Drawing tokens: what the parameters leave, how often each is drawn, and that nothing else matters."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from embertrain.engine.sampling import Sampling, choose, draw, uniform
from embertrain.errors import ConfigError

LOGITS = torch.tensor([0.1, 0.4, 0.2, 0.25, 0.05]).log()


def drawn(sampling: Sampling, count: int = 4000) -> dict[int, float]:
    tokens = Counter(int(draw(LOGITS, sampling, (i + 0.5) / count)) for i in range(count))
    return {token: times / count for token, times in sorted(tokens.items())}


def test_tokens_come_as_often_as_they_are_likely() -> None:
    assert drawn(Sampling(temperature=1)) == pytest.approx({0: 0.1, 1: 0.4, 2: 0.2, 3: 0.25, 4: 0.05}, abs=1e-3)
    squared = [p * p for p in (0.1, 0.4, 0.2, 0.25, 0.05)]
    sharper = {i: p / sum(squared) for i, p in enumerate(squared)}
    assert drawn(Sampling(temperature=0.5)) == pytest.approx(sharper, abs=1e-3)


def test_top_k_and_top_p_leave_the_likely_ones() -> None:
    assert drawn(Sampling(temperature=1, top_k=2)) == pytest.approx({1: 0.4 / 0.65, 3: 0.25 / 0.65}, abs=1e-3)
    assert drawn(Sampling(temperature=1, top_p=0.6)) == pytest.approx({1: 0.4 / 0.65, 3: 0.25 / 0.65}, abs=1e-3)
    assert drawn(Sampling(temperature=1, top_p=0.66)).keys() == {1, 2, 3}
    assert drawn(Sampling(temperature=1, top_p=1e-9)).keys() == {1}
    assert drawn(Sampling(temperature=1, top_k=99)) == drawn(Sampling(temperature=1))


def test_of_equal_logits_the_lowest_id_comes_first() -> None:
    flat = torch.zeros(3, 7)
    greedy, only = Sampling(), Sampling(temperature=1, top_k=1)
    assert choose(flat, [(greedy, 0), (only, 0), (greedy, 1)]) == [0, 0, 0]


def test_a_row_depends_on_its_seed_and_step_only() -> None:
    rows = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    how = [(Sampling(temperature=1.5, seed=seed), step) for seed, step in [(1, 0), (1, 1), (2, 0), (3, 7)]]
    together = choose(rows, how)
    assert together == [choose(rows[i : i + 1], [how[i]])[0] for i in range(4)]
    assert len({uniform(seed, step) for seed in range(30) for step in range(30)}) == 900
    assert uniform(1, 2) == 0.227235741610455


def test_a_row_that_is_not_finite_gives_no_token() -> None:
    rows = torch.tensor([[0.0, torch.nan], [0.0, 1.0], [torch.inf, 0.0]])
    assert (
        choose(rows, [(Sampling(), 0), (Sampling(temperature=1), 0), (Sampling(temperature=1), 0)])[0::2] == [None] * 2
    )


@pytest.mark.parametrize("wrong", [{"temperature": -1}, {"top_p": 0}, {"top_p": 1.1}, {"top_k": 0}])
def test_parameters_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Sampling(**wrong)  # type: ignore[arg-type]
