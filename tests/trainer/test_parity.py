"""Our model against transformers' on random small shapes, number for number, in fp32.

V4, V3 and V3.2: logits of a full forward, of chunks and of single tokens through a cache, and gradients. Of V4 the
published code leaves the shared expert unclamped; transformers does not, and is patched where the limit binds.
"""

from __future__ import annotations

import copy
import random
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from embertrain.cache.cache import Cache
from embertrain.cache.spec import CacheSpec
from embertrain.model.batch import Batch
from embertrain.model.config import ModelConfig
from embertrain.model.model import Model

from . import oracle
from .margins import MARGIN, Margins

COUNT = 300
SEEDS = range(12)
LOGITS = 2e-5
ROUNDING = 1.2e-5
"""How far the oracle's logits may be from its own with fp64 products. A shape that rounds worse came out on either side
of LOGITS, with AVX-512 and without."""


@cache
def draw(family: str, seed: int, **options: Any) -> tuple[ModelConfig, Any, Model, torch.Tensor, torch.Tensor]:
    """A shape whose choices are no toss-up, and which fp32 can tell; both models with the same weights, tokens, and the
    oracle's logits."""
    for attempt in range(20):
        rng = random.Random(f"{family} {seed} {attempt}")
        if family == "v4":
            config = oracle.v4_config(rng, **options)
            theirs = oracle.v4_oracle(config)
        else:
            config = oracle.v3_config(rng, sparse=family == "v32")
            theirs = oracle.v3_oracle(config)
        oracle.randomise(theirs, rng.randrange(1 << 30))
        if options.get("swiglu_limit", 10.0) < 10:
            oracle.unclamp_shared(theirs)
        ids = oracle.tokens(rng.randrange(1 << 30), COUNT, config.vocab_size)
        with torch.no_grad(), Margins() as margins:
            expected = theirs(ids[None], use_cache=False).logits[0]
            exact = copy.deepcopy(theirs).double()(ids[None], use_cache=False).logits[0]
        rounding = float((expected - exact).abs().max())
        if margins.least >= MARGIN and rounding <= ROUNDING:
            ours = Model(config, mtp=False)
            oracle.copy_weights(ours, theirs)
            return config, theirs, ours, ids, expected
        print(f"{family} {seed}: drawn again, a choice had a margin of {margins.least:.1e}, rounding {rounding:.1e}")
    raise AssertionError("no shape to compare in 20 draws")


def cached_logits(model: Model, ids: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """Logits of all tokens, fed to a cache so many at a time."""
    assert sum(counts) == len(ids)
    cache = Cache(CacheSpec.of(model.config, torch.float32), sequences=2, pages=-(-len(ids) // 128))
    sequence, at, out = cache.open(), 0, []
    for count in counts:
        out.append(model(ids[at : at + count], Batch.of([(at, count, sequence)]), cache).logits)
        at += count
    return torch.cat(out)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("family", ["v3", "v32", "v4"])
def test_logits_are_the_oracles(family: str, seed: int) -> None:
    _, _, ours, ids, expected = draw(family, seed)
    with torch.no_grad():
        full = ours(ids, Batch.of([(0, COUNT)])).logits
        assert 0.5 < float(expected.std()) < 2
        assert float((full - expected).abs().max()) <= LOGITS
        chunks = cached_logits(ours, ids, [7, 130, 50, 1, 1, 1, 86, 5, *[1] * 19])
        assert float((chunks - full).abs().max()) <= LOGITS


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("family", ["v3", "v32", "v4"])
def test_gradients_are_the_oracles(family: str, seed: int) -> None:
    _, theirs, ours, ids, _ = draw(family, seed)
    targets = ids.roll(-1)
    theirs.zero_grad()
    ours.zero_grad()
    F.cross_entropy(theirs(ids[None], use_cache=False).logits[0], targets).backward()
    loss, _ = ours.loss(ids, targets, Batch.of([(0, COUNT)]))
    loss.backward()
    expected = dict(theirs.named_parameters())
    # Where much cancels, rounding is all there is: no gradient counts as less than a thousandth of the greatest.
    floor = 1e-3 * max(float(p.grad.norm()) for p in expected.values() if p.grad is not None)
    compared = 0
    for name, other in oracle.names(ours).items():
        if "indexer" in name:  # chosen by top-k: the language model's loss does not reach it
            continue
        grad, reference = ours.get_parameter(name).grad, expected[other].grad
        assert grad is not None and reference is not None, name
        scale = max(float(reference.norm()), floor)
        assert float((grad - reference).norm()) / scale <= 1e-4, name
        compared += 1
    assert compared > 20


@pytest.mark.parametrize("seed", range(3))
def test_the_clamp_binds_in_routed_experts_only(seed: int) -> None:
    _, _, ours, ids, expected = draw("v4", seed, swiglu_limit=0.5)
    with torch.no_grad():
        ours_logits = ours(ids, Batch.of([(0, COUNT)])).logits
    assert float((ours_logits - expected).abs().max()) <= LOGITS
    free = oracle.without_limit(ours)
    with torch.no_grad():
        unclamped = free(ids, Batch.of([(0, COUNT)])).logits
    assert float((unclamped - expected).abs().max()) > 0.1, "the limit must bind, or the test shows nothing"


@pytest.mark.parametrize("family", ["v3", "v32", "v4"])
def test_documents_packed_together_do_not_see_each_other(family: str) -> None:
    _, _, ours, ids, expected = draw(family, 1)
    other = oracle.tokens(99, 41, ours.config.vocab_size)
    with torch.no_grad():
        packed = ours(torch.cat([other, ids, other]), Batch.of([(0, 41), (0, COUNT), (0, 41)])).logits
    assert float((packed[41:-41] - expected).abs().max()) <= LOGITS
    assert float((packed[:41] - packed[-41:]).abs().max()) <= LOGITS


@pytest.mark.parametrize("family", ["v3", "v32", "v4"])
def test_a_batch_of_unequal_sequences_decodes_like_each_alone(family: str) -> None:
    _, _, ours, ids, expected = draw(family, 2)
    cache = Cache(CacheSpec.of(ours.config, torch.float32), sequences=3, pages=9)
    starts = [3, 150, 260]
    with torch.no_grad():
        sequences = [cache.open() for _ in starts]
        for sequence, count in zip(sequences, starts, strict=True):
            ours(ids[:count], Batch.of([(0, count, sequence)]), cache)
        for i in range(30):
            at = [count + i for count in starts]
            batch = Batch.of([(p, 1, s) for p, s in zip(at, sequences, strict=True)])
            got = ours(ids[torch.tensor(at)], batch, cache).logits
            assert float((got - expected[torch.tensor(at)]).abs().max()) <= LOGITS
        # A chunk of one sequence beside single tokens of the others is one call as well.
        at = [starts[0] + 30, starts[1] + 30]
        runs = [(at[0], 1, sequences[0]), (at[1], 20, sequences[1])]
        batch = Batch.of(runs, logits=[0, 20])
        got = ours(torch.cat([ids[at[0] : at[0] + 1], ids[at[1] : at[1] + 20]]), batch, cache).logits
        want = torch.stack([expected[at[0]], expected[at[1] + 19]])
        assert float((got - want).abs().max()) <= LOGITS
