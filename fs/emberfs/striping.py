"""Which chain holds which chunk: a seeded shuffle that is our own, so that no library can change it under stored data.

`stripe_chains` is a Fisher–Yates shuffle of the chain ids 1..chain_count driven by SplitMix64 (Steele, Lea and Flood,
OOPSLA 2014), cut to the stripe. The numbers are fixed by the test vectors in `tests/fs/test_striping.py`: a change
here would make every stored file unreadable.
"""

from __future__ import annotations

from functools import lru_cache

from .types import Chunks

_MASK = (1 << 64) - 1


def splitmix64(state: int) -> tuple[int, int]:
    """(next state, output)."""
    state = (state + 0x9E3779B97F4A7C15) & _MASK
    mixed = state
    mixed = ((mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9) & _MASK
    mixed = ((mixed ^ mixed >> 27) * 0x94D049BB133111EB) & _MASK
    return state, mixed ^ mixed >> 31


@lru_cache(maxsize=4096)
def stripe_chains(chain_count: int, stripe: int, seed: int) -> tuple[int, ...]:
    """The chains of a file in stripe order: chunk `i` lies on chain `result[i % stripe]`."""
    chains = list(range(1, chain_count + 1))
    state = seed & _MASK
    for index in range(min(stripe, chain_count - 1)):
        state, random = splitmix64(state)
        # Multiply-shift maps 64 random bits to [0, n) without a modulo; its bias below 2**-40 does not matter here.
        other = index + (random * (chain_count - index) >> 64)
        chains[index], chains[other] = chains[other], chains[index]
    return tuple(chains[:stripe])


def chains_of(layout: Chunks) -> tuple[int, ...]:
    """The stripe of a layout."""
    return stripe_chains(layout.chain_count, layout.stripe, layout.seed)
