"""The shuffle that says which chain holds a chunk. The numbers here are a format: they must never change."""

from __future__ import annotations

from collections import Counter

import pytest
from emberfs.striping import chains_of, splitmix64, stripe_chains
from emberfs.types import Chunks
from hypothesis import given
from hypothesis import strategies as st

VECTORS = [
    ((1, 1, 0), (1,)),
    ((1, 1, 7), (1,)),
    ((8, 8, 0), (8, 5, 3, 1, 2, 6, 7, 4)),
    ((8, 3, 1), (5, 7, 8)),
    ((16, 4, 0xDEADBEEF), (5, 15, 3, 9)),
    ((5, 5, (1 << 64) - 1), (5, 1, 3, 4, 2)),
    ((100, 6, 123_456_789), (14, 49, 21, 54, 1, 72)),
    ((256, 10, 42), (190, 42, 73, 91, 14, 223, 61, 207, 93, 162)),
]


@pytest.mark.parametrize(("arguments", "chains"), VECTORS)
def test_vectors(arguments: tuple[int, int, int], chains: tuple[int, ...]) -> None:
    assert stripe_chains(*arguments) == chains


def test_the_generator_is_splitmix64() -> None:
    """The first outputs for seed 1234567, as other implementations give them."""
    state, outputs = 1_234_567, []
    for _ in range(3):
        state, output = splitmix64(state)
        outputs.append(output)
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@given(st.data(), st.integers(1, 300), st.integers(0, (1 << 64) - 1))
def test_a_stripe_is_a_part_of_a_permutation(data: st.DataObject, chain_count: int, seed: int) -> None:
    whole = stripe_chains(chain_count, chain_count, seed)
    assert sorted(whole) == list(range(1, chain_count + 1))
    stripe = data.draw(st.integers(1, chain_count))
    assert stripe_chains(chain_count, stripe, seed) == whole[:stripe]


def test_seeds_spread_evenly_over_chains() -> None:
    """10,000 files of 4 chains out of 16: each chain is in 2500 of them, give or take 4 standard deviations."""
    counts = Counter(chain for seed in range(10_000) for chain in stripe_chains(16, 4, seed))
    assert all(abs(count - 2500) < 4 * (10_000 * 0.25 * 0.75) ** 0.5 for count in counts.values()), counts
    firsts = Counter(stripe_chains(16, 4, seed)[0] for seed in range(10_000))
    assert all(abs(count - 625) < 4 * (10_000 / 16) ** 0.5 for count in firsts.values()), firsts


def test_a_layout_names_its_chains() -> None:
    layout = Chunks(chunk_size_bytes=4 << 20, chain_count=16, stripe=4, seed=0xDEADBEEF)
    assert chains_of(layout) == (5, 15, 3, 9)
