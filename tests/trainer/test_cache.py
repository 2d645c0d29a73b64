"""A sequence is a value: rows are exported, imported elsewhere and cut off, and all goes on as if nothing had been.

A state machine appends, truncates, exports and imports at random; a model without a cache says what is right.
"""

from __future__ import annotations

import random

import pytest
import torch
from embertrain.cache.cache import Cache
from embertrain.cache.spec import PAGE_TOKENS, CacheSpec
from embertrain.errors import ContextError
from embertrain.model.batch import Batch
from embertrain.model.model import Model

from . import oracle

LOGITS = 2e-5
DRAFTS = 5
LENGTH = 420


def model_of(family: str, seed: int) -> Model:
    rng = random.Random(seed)
    config = oracle.v4_config(rng) if family == "v4" else oracle.v3_config(rng, sparse=family == "v32")
    model = Model(config, mtp=False)
    oracle.randomise(model, seed)
    return model


def cache_of(model: Model, sequences: int, pages: int) -> Cache:
    return Cache(CacheSpec.of(model.config, torch.float32), sequences=sequences, pages=pages, drafts=DRAFTS)


@pytest.mark.parametrize("family", ["v3", "v32", "v4"])
@pytest.mark.parametrize("seed", range(3))
def test_random_appends_and_truncations_leave_what_was_never_there(family: str, seed: int) -> None:
    model, rng = model_of(family, seed), random.Random(seed)
    ids = oracle.tokens(seed, LENGTH, model.config.vocab_size)
    drafts = oracle.tokens(seed + 1, DRAFTS, model.config.vocab_size)
    cache = cache_of(model, 3, 12)
    with torch.no_grad():
        expected = model(ids, Batch.of([(0, LENGTH)])).logits
        sequence, at = cache.open(), 0
        while at < LENGTH:
            if rng.random() < 0.3 and at:
                # Speculation: some tokens, one by one or as a chunk, that turn out wrong.
                count = rng.randint(1, DRAFTS)
                runs = [count] if rng.random() < 0.5 else [1] * count
                done = 0
                for n in runs:
                    model(drafts[done : done + n], Batch.of([(at + done, n, sequence)]), cache)
                    done += n
                cache.truncate(sequence, at)
            if rng.random() < 0.2 and at:
                # Moved to another place of another cache.
                rows = cache.export(sequence, 0, at)
                cache.close(sequence)
                cache = cache_of(model, 3, 12)
                cache.open()
                sequence = cache.open()
                cache.import_(sequence, 0, at, rows)
            count = min(LENGTH - at, rng.choice([1, 1, 2, 7, 64, 129]))
            got = model(ids[at : at + count], Batch.of([(at, count, sequence)]), cache).logits
            assert float((got - expected[at : at + count]).abs().max()) <= LOGITS
            at += count


def test_pages_come_back_and_run_out() -> None:
    model = model_of("v4", 0)
    cache = cache_of(model, 2, 3)
    first = cache.open()
    cache.reserve(first, 2 * PAGE_TOKENS + 1)
    assert cache.free_pages == 0
    second = cache.open()
    with pytest.raises(ContextError, match="1 more pages"):
        cache.reserve(second, 1)
    with pytest.raises(ContextError, match="sequences of the cache are taken"):
        cache.open()
    cache.advance(first, 2 * PAGE_TOKENS + 1)
    cache.truncate(first, 2 * PAGE_TOKENS)
    assert cache.free_pages == 1
    cache.close(first)
    assert cache.free_pages == 3


def test_a_ring_cannot_be_cut_back_beyond_its_drafts() -> None:
    model = model_of("v4", 0)
    cache = cache_of(model, 1, 2)
    sequence = cache.open()
    ids = oracle.tokens(1, 200, model.config.vocab_size)
    with torch.no_grad():
        model(ids, Batch.of([(0, 200, sequence)]), cache)
    with pytest.raises(ContextError, match="can't be cut off"):
        cache.truncate(sequence, 200 - DRAFTS - 1)
    cache.truncate(sequence, 0)
    assert cache.length(sequence) == 0 and cache.free_pages == 2


def test_scattered_pages_give_the_same_rows_as_adjoining_ones() -> None:
    model = model_of("v4", 4)
    ids = oracle.tokens(4, 300, model.config.vocab_size)
    with torch.no_grad():
        expected = model(ids, Batch.of([(0, 300)])).logits
        cache = cache_of(model, 2, 6)
        a, b = cache.open(), cache.open()
        got = []
        for at in range(0, 300, 50):  # two sequences grow in turn: neither's pages adjoin
            for sequence in (a, b):
                out = model(ids[at : at + 50], Batch.of([(at, 50, sequence)]), cache).logits
            got.append(out)
        assert cache.adjoining(a) is None
        assert float((torch.cat(got) - expected).abs().max()) <= LOGITS
        runs = [(299, 1, a), (299, 1, b)]
        cache.truncate(a, 299)
        cache.truncate(b, 299)
        both = model(ids[299:].repeat(2), Batch.of(runs), cache).logits
        assert float((both - expected[299]).abs().max()) <= LOGITS
