"""What prefix reuse rests on, without a service: rows in pages, where chunks end, and replays of a cache.

Run: pytest tests/trainer/test_prefix_pages.py.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from embertrain.cache.cache import Cache, Rows
from embertrain.cache.spec import PAGE_TOKENS, CacheSpec
from embertrain.lora import LoraConfig, attach
from embertrain.model.batch import Batch
from embertrain.model.model import Model
from embertrain.prefix import numerics as numerics_module
from embertrain.prefix.layout import Layout
from embertrain.prefix.numerics import fingerprint, numerics
from embertrain.prefix.trail import Trail
from embertrain.prefix.windows import Windows
from hypothesis import given
from hypothesis import strategies as st

from . import oracle
from .prefix_lab import model_of


@given(seed=st.integers(0, 1000), pages=st.integers(1, 4), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_rows_come_out_of_a_page_as_they_went_in(seed: int, pages: int, dtype: torch.dtype) -> None:
    rng = random.Random(seed)
    config = oracle.v4_config(rng) if rng.random() < 0.7 else oracle.v3_config(rng, sparse=rng.random() < 0.5)
    spec, end = CacheSpec.of(config, dtype), pages * PAGE_TOKENS
    kept: Rows = {}
    states: Rows = {}
    for layer, rows in enumerate(spec.layers):
        for row in rows:
            count, into = (end // row.tokens, kept) if row.trailing is None else (row.needed(end), states)
            into[layer, row.kind] = torch.randn(count, row.width).to(row.dtype)
    layout = Layout(spec)
    packed = layout.pack_rows(kept, pages)
    assert packed.shape == (pages, spec.page_bytes)
    assert_same(layout.unpack_rows(packed), kept)
    assert_same(layout.unpack_rows(packed[1:]), {key: rows[len(rows) // pages :] for key, rows in kept.items()})
    if states:
        assert_same(layout.unpack_states(layout.pack_states(states), end), states)
    assert (layout.states_bytes > 0) == bool(states)


def assert_same(one: Rows, other: Rows) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


@given(
    prompt=st.integers(1, 3000),
    cached_pages=st.integers(0, 10),
    interval_pages=st.sampled_from([None, 1, 3, 8]),
    replayed_pages=st.integers(0, 3),
    rng=st.randoms(use_true_random=False),
)
def test_chunks_end_wherever_states_are_kept_and_replay_whole_pages(
    prompt: int, cached_pages: int, interval_pages: int | None, replayed_pages: int, rng: random.Random
) -> None:
    cached = min(cached_pages, (prompt - 1) // PAGE_TOKENS) * PAGE_TOKENS
    replayed = 0 if interval_pages else min(replayed_pages * PAGE_TOKENS, cached)
    interval = None if interval_pages is None else interval_pages * PAGE_TOKENS
    whole = prompt // PAGE_TOKENS
    trail = Trail(prompt, [], None, interval, cached, replayed, ends=frozenset([whole]))
    at, ends = cached - replayed, []
    while at < prompt:
        left = rng.choice([PAGE_TOKENS, PAGE_TOKENS + 1, 300, 512])
        end = trail.cut(at, min(prompt, at + left))
        assert at < end <= min(prompt, at + left)
        if trail.replays(at):
            assert end <= cached and end % PAGE_TOKENS == 0
        at = end
        ends.append(end)
    if interval is not None:
        wanted = {*range(0, prompt, interval), whole * PAGE_TOKENS}
        assert {n for n in wanted if n > cached} <= set(ends)


def test_a_replay_writes_rings_and_nothing_else() -> None:
    model, ids = model_of("v4"), oracle.tokens(1, 700, 256)
    model.batch_invariant(True)
    spec = CacheSpec.of(model.config, torch.float32)
    tokens = Windows.read("zero").replay_tokens(spec)
    assert tokens == 128 * len(model.config.layers)
    cache = Cache(spec, sequences=2, pages=8)
    cache.open()
    sequence = cache.open()

    def go(begin: int, end: int) -> torch.Tensor:
        for first in range(begin, end, PAGE_TOKENS):
            count = min(PAGE_TOKENS, end - first)
            with torch.no_grad():
                logits = model(ids[first : first + count], Batch.of([(first, count, sequence)]), cache).logits
        return logits

    go(0, 640)
    before = cache.export(sequence, 0, 640)
    expected = go(640, 700)
    cache.import_(sequence, 0, 640, before)
    cache.replay(sequence, 640 - tokens)
    with pytest.raises(AssertionError, match="a sequence that replays"):
        cache.export(sequence, 0, cache.length(sequence))
    go(640 - tokens, 640)
    assert cache.length(sequence) == 640
    assert_same(cache.export(sequence, 0, 640), before)  # what a cold run has there, windows and all
    assert torch.equal(go(640, 700), expected)


def test_a_fingerprint_is_of_every_weight() -> None:
    one, same, other = (Model(model_of("v4").config, mtp=False) for _ in range(3))
    for model in (one, same, other):
        oracle.randomise(model, 5)
    assert fingerprint(one) == fingerprint(same)
    with torch.no_grad():
        other.layers["2"].ffn.gate.bias[0] += 1e-6  # type: ignore[union-attr, index]
    assert fingerprint(one) != fingerprint(other)
    assert fingerprint(one) != fingerprint(same.cast(torch.bfloat16))


def test_a_fingerprint_is_of_adapters_and_how_much_they_count() -> None:
    found = set()
    for alpha in (None, 8.0, 16.0):
        model = Model(model_of("v4").config, mtp=False)
        oracle.randomise(model, 5)
        if alpha is not None:
            attach(model, LoraConfig(alpha=alpha), torch.Generator().manual_seed(1))
        found.add(fingerprint(model))
    assert len(found) == 3


def test_the_tag_of_invariant_bits_says_what_they_depend_on() -> None:
    cpu = torch.device("cpu")
    assert numerics(cpu, batch_invariant=False) == "free"
    tag = numerics(cpu, batch_invariant=True)
    assert torch.__version__ in tag and f"threads {torch.get_num_threads()}" in tag and tag.isprintable()


def test_the_tag_of_invariant_bits_tells_processors_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def tag(cpuinfo: str | None) -> str:
        path = tmp_path / "cpuinfo"
        path.unlink(missing_ok=True)
        if cpuinfo is not None:
            path.write_text(cpuinfo)
        monkeypatch.setattr(numerics_module, "CPUINFO", path)
        return numerics(torch.device("cpu"), batch_invariant=True)

    one = "processor\t: 0\nmodel name\t: A\ncpu MHz\t\t: 2000\nflags\t\t: avx2 avx512f\n"
    same = one + one.replace(": 0", ": 1").replace("2000", "1800")
    others = [one.replace("model name\t: A", "model name\t: B"), one.replace("avx512f", "avx512f amx_bf16"), None]
    assert tag(one) == tag(same)
    assert len({tag(each) for each in (one, *others)}) == 4
    before = tag(one)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert tag(one) != before
