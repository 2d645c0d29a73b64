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
from torch import Tensor

from . import oracle
from .margins import MARGIN, Margins

LOGITS = 2e-5
DRAFTS = 5
LENGTH = 420


def model_of(family: str, seed: int) -> Model:
    rng = random.Random(seed)
    config = oracle.v4_config(rng) if family == "v4" else oracle.v3_config(rng, sparse=family == "v32")
    model = Model(config, mtp=False)
    oracle.randomise(model, seed)
    return model


def drawn(family: str, seed: int) -> tuple[Model, Tensor, Tensor]:
    """A model and tokens whose choices are no toss-up, and the logits of all at once."""
    for attempt in range(20):
        model = model_of(family, seed + 100 * attempt)
        ids = oracle.tokens(seed, LENGTH, model.config.vocab_size)
        with torch.no_grad(), Margins() as margins:
            expected = model(ids, Batch.of([(0, LENGTH)])).logits
        if margins.least >= MARGIN:
            return model, ids, expected
    raise AssertionError("no model without a toss-up in 20 draws")


def cache_of(model: Model, sequences: int, pages: int) -> Cache:
    return Cache(CacheSpec.of(model.config, torch.float32), sequences=sequences, pages=pages, drafts=DRAFTS)


@pytest.mark.parametrize("family", ["v3", "v32", "v4"])
@pytest.mark.parametrize("seed", range(3))
def test_random_appends_and_truncations_leave_what_was_never_there(family: str, seed: int) -> None:
    model, ids, expected = drawn(family, seed)
    rng = random.Random(seed)
    drafts = oracle.tokens(seed + 1, DRAFTS, model.config.vocab_size)
    cache = cache_of(model, 3, 12)
    with torch.no_grad():
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
    cache.truncate(sequence, 200 - DRAFTS)
    with pytest.raises(ContextError, match="allow for no less than 195"):
        cache.truncate(sequence, 200 - DRAFTS - 1)  # not by and by either: they were overwritten by token 199
    cache.truncate(sequence, 0)
    assert cache.length(sequence) == 0 and cache.free_pages == 2
    with torch.no_grad():
        model(ids[:20], Batch.of([(0, 20, sequence)]), cache)


def test_what_was_imported_cannot_be_cut_back() -> None:
    model = model_of("v4", 0)
    ids = oracle.tokens(1, 300, model.config.vocab_size)
    first, second = cache_of(model, 1, 3), cache_of(model, 1, 3)
    a, b = first.open(), second.open()
    with torch.no_grad():
        model(ids, Batch.of([(0, 300, a)]), first)
        second.import_(b, 0, 300, first.export(a, 0, 300))
        with pytest.raises(ContextError, match="allow for no less than 300"):
            second.truncate(b, 299)


def test_a_sequence_without_its_last_rows_is_not_gone_on_with() -> None:
    """An import without rings, until another brings them; a call that failed when it had overwritten them."""
    model = model_of("v4", 0)
    ids = oracle.tokens(1, 300, model.config.vocab_size)
    cache = cache_of(model, 2, 6)
    a, b = cache.open(), cache.open()
    with torch.no_grad():
        expected = model(ids, Batch.of([(0, 300)])).logits
        model(ids[:200], Batch.of([(0, 200, a)]), cache)
        cache.import_(b, 0, 128, cache.export(a, 0, 128))
        with pytest.raises(ContextError, match="rings lack the last rows"):
            model(ids[128:129], Batch.of([(128, 1, b)]), cache)
        cache.import_(b, 128, 200, cache.export(a, 128, 200))
        got = model(ids[200:], Batch.of([(200, 100, b)]), cache).logits
        assert float((got - expected[200:]).abs().max()) <= LOGITS

        failing = model.layers["3"].register_forward_pre_hook(lambda *_: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            model(ids[200:], Batch.of([(200, 100, a)]), cache)
        failing.remove()
        with pytest.raises(ContextError, match="rings lack the last rows"):
            model(ids[200:], Batch.of([(200, 100, a)]), cache)
        cache.truncate(a, 0)
        got = model(ids, Batch.of([(0, 300, a)]), cache).logits
        assert float((got - expected).abs().max()) <= LOGITS


def test_rows_of_another_shape_are_refused() -> None:
    model = model_of("v4", 0)
    cache = cache_of(model, 2, 6)
    a, b = cache.open(), cache.open()
    with torch.no_grad():
        model(oracle.tokens(1, 200, model.config.vocab_size), Batch.of([(0, 200, a)]), cache)
    with pytest.raises(AssertionError, match="rows 0, window"):
        cache.import_(b, 0, 300, cache.export(a, 0, 200) | {(0, "window"): torch.zeros(3, 32)})


def test_a_step_takes_a_sequence_once_and_no_gradients() -> None:
    model = model_of("v4", 0)
    cache = cache_of(model, 1, 1)
    sequence = cache.open()
    ids = torch.tensor([1, 2])
    with torch.no_grad(), pytest.raises(AssertionError, match="in a batch once"):
        model(ids, Batch.of([(0, 1, sequence), (0, 1, sequence)]), cache)
    with pytest.raises(
        AssertionError, match="no gradients"
    ):  # decoding, too: pools would hold on to every step's graph
        model(ids[:1], Batch.of([(0, 1, sequence)]), cache)
    assert not cache.pool(0, "window").requires_grad


def test_nan_in_one_sequence_stays_there() -> None:
    """Short sequences beside long ones leave places empty; what lies in other sequences' rows must not come in."""
    model = model_of("v4", 0)
    ids = oracle.tokens(1, 300, model.config.vocab_size)
    cache = cache_of(model, 3, 6)
    broken, short, long = cache.open(), cache.open(), cache.open()
    with torch.no_grad():
        expected = model(ids, Batch.of([(0, 300)])).logits
        for sequence, count in ((broken, 20), (short, 3), (long, 200)):
            model(ids[:count], Batch.of([(0, count, sequence)]), cache)
        for layer, rows in enumerate(cache.spec.layers):
            for row in rows:
                count = row.rows_per_page if row.trailing is None else cache.ring(row)
                cache.pool(layer, row.kind)[:count] = torch.nan
        cache.close(broken)
        got = model(ids[[3, 200]], Batch.of([(3, 1, short), (200, 1, long)]), cache).logits
        assert float((got - expected[[3, 200]]).abs().max()) <= LOGITS


def test_pages_adjoin_again_after_all_were_given_back() -> None:
    cache = cache_of(model_of("v4", 0), 2, 4)
    a, b = cache.open(), cache.open()
    cache.reserve(a, 1)
    cache.reserve(b, 1)
    cache.reserve(a, PAGE_TOKENS + 1)
    assert cache.adjoining(a) is None
    cache.advance(a, PAGE_TOKENS + 1)
    cache.truncate(a, 0)
    cache.reserve(a, 1)
    assert cache.adjoining(a) is not None


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
