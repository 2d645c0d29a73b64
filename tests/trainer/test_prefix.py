"""Prefix reuse: a request that begins behind pages from disk goes on as one that computed all, to the bit.

Run: pytest tests/trainer/test_prefix.py. The service is a process; models are small and have all parts.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from embertrain.cache.cache import Cache
from embertrain.cache.spec import CacheSpec
from embertrain.errors import ConfigError
from embertrain.model.model import Model
from embertrain.prefix import Prefixes, Windows

from . import oracle
from .prefix_lab import DTYPES, FAMILIES, Service, answers, computed, engine_of, model_of, patient, serving

PAGE = 128
STRATEGIES = ["full", "periodic:256", "zero"]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with serving(tmp_path_factory.mktemp("prefix")) as running:
        yield running


def relatives(seed: int, count: int, longest: int) -> list[list[int]]:
    """Prompts that share beginnings of any length."""
    rng = random.Random(seed)
    prompts = [oracle.tokens(seed, longest, 256).tolist()]
    for i in range(count - 1):
        shared = rng.choice(prompts)[: rng.choice([PAGE, 2 * PAGE + 5, 5 * PAGE, longest])]
        own = oracle.tokens(seed + 100 + i, rng.randint(1, 200), 256).tolist()
        prompts.append([*shared, *own])
    return prompts


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_hit_changes_no_bit(service: Service, family: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(family, dtype)
    prompts = relatives(len(family), 4, 700)
    _, expected = answers(engine_of(model), prompts, monkeypatch)
    for windows in STRATEGIES if family == "v4" else ["full"]:
        prefixes = patient(service, windows=windows, salt=windows)
        for prompt, rows in zip(prompts, expected, strict=True):  # some find pages of those before
            _, (got,) = answers(engine_of(model, prefixes), [prompt], monkeypatch)
            assert torch.equal(got, rows)
        requests, together = answers(engine_of(model, prefixes), prompts, monkeypatch)
        assert all(torch.equal(got, rows) for got, rows in zip(together, expected, strict=True))
        for request in requests:
            usable = (len(request.prompt_ids) - 1) // PAGE * PAGE
            if family != "v4" or windows == "full":
                assert request.cached_tokens == usable
            elif windows == "zero":
                assert request.cached_tokens == (usable if usable > 3 * PAGE else 0)
            else:  # the end of a prompt may have been kept where another one goes on
                assert usable // 256 * 256 <= request.cached_tokens <= usable


@pytest.mark.parametrize("seed", range(3))
def test_layers_of_any_order_are_replayed_to_the_bit(
    service: Service, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows of 16 or 128 tokens, with compressed entries of all ratios in random layers."""
    model = Model(oracle.v4_config(random.Random(seed), vocab_size=256), mtp=False)
    oracle.randomise(model, seed)
    prompt = oracle.tokens(seed, 1000, 256).tolist()
    _, expected = answers(engine_of(model), [prompt], monkeypatch)
    prefixes = patient(service, windows="zero")
    for _ in range(2):
        (request,), got = answers(engine_of(model, prefixes), [prompt], monkeypatch)
        assert torch.equal(got[0], expected[0])
    assert request.cached_tokens == 896


@pytest.mark.parametrize("invariant", [True, False])
def test_zero_windows_recompute_128_tokens_a_layer(
    service: Service, invariant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompt = model_of("v4"), oracle.tokens(5, 1000, 256).tolist()
    prefixes = patient(service, windows="zero", salt=f"count {invariant}")
    answers(engine_of(model, prefixes, invariant=invariant), [prompt], monkeypatch)
    with computed(model) as counts:
        (request,), _ = answers(engine_of(model, prefixes, invariant=invariant), [prompt], monkeypatch, new=1)
    layers = len(model.config.layers)
    assert request.cached_tokens == 896
    assert sum(counts) == 128 * layers + (1000 - 896)
    rows = CacheSpec.of(model.config, torch.float32).page_bytes
    engine = engine_of(model, prefixes, invariant=invariant)
    answers(engine, [prompt], monkeypatch)
    assert engine.reuse is not None and engine.reuse.counts.read_bytes == 7 * rows


def test_a_page_less_would_be_too_little(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """And is seen here: the bits tell."""
    model, prompt = model_of("v4"), oracle.tokens(6, 1000, 256).tolist()
    _, expected = answers(engine_of(model), [prompt], monkeypatch)
    prefixes = patient(service, windows="zero")
    answers(engine_of(model, prefixes), [prompt], monkeypatch)
    monkeypatch.setattr(Windows, "replay_tokens", lambda self, spec: 2 * PAGE)
    (request,), got = answers(engine_of(model, prefixes), [prompt], monkeypatch)
    assert request.cached_tokens == 896 and not torch.equal(got[0], expected[0])


@pytest.mark.parametrize(("family", "windows"), [*(("v4", windows) for windows in STRATEGIES), ("v3.2", "full")])
def test_otherwise_logits_agree_and_answers_are_reused_too(
    service: Service, family: str, windows: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(family)
    prefixes = patient(service, windows=windows, salt="free")
    prompt = oracle.tokens(7, 500, 256).tolist()
    (first,), _ = answers(engine_of(model, prefixes, invariant=False), [prompt], monkeypatch, new=150)
    more = [*prompt, *first.new_ids, *oracle.tokens(8, 50, 256).tolist()]  # the next turn: 640 tokens have rows
    _, (expected,) = answers(engine_of(model, invariant=False), [more], monkeypatch)
    (turn,), (got,) = answers(engine_of(model, prefixes, invariant=False), [more], monkeypatch)
    assert turn.cached_tokens == 640
    assert float((got - expected).abs().max()) <= 2e-5


def test_periodic_windows_are_kept_at_intervals_ends_and_partings(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of("v4")
    prefixes = patient(service, windows="periodic:512", salt="partings")
    common = oracle.tokens(9, 950, 256).tolist()
    found = []
    for seed in range(3):  # alike for 7 pages: none; its interval; where the second one was seen to part
        prompt = [*common, *oracle.tokens(20 + seed, 300, 256).tolist()]
        (request,), got = answers(engine_of(model, prefixes), [prompt], monkeypatch)
        _, expected = answers(engine_of(model), [prompt], monkeypatch)
        assert torch.equal(got[0], expected[0])
        found.append(request.cached_tokens)
    assert found == [0, 512, 896]
    (last,), _ = answers(engine_of(model, prefixes), [[*prompt, *common]], monkeypatch)
    assert last.cached_tokens == 1250 // PAGE * PAGE


def test_a_request_that_is_pre_empted_while_it_replays_begins_anew(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of("v4")
    long, short = oracle.tokens(30, 700, 256).tolist(), oracle.tokens(31, 127, 256).tolist()
    prefixes = patient(service, windows="zero", salt="pre-empted")
    answers(engine_of(model, prefixes), [long], monkeypatch)
    _, expected = answers(engine_of(model), [short, long], monkeypatch, new=6)
    replayed: list[int] = []
    replay = Cache.replay
    monkeypatch.setattr(Cache, "replay", lambda *given: (replayed.append(given[2]), replay(*given))[1])
    engine = engine_of(model, prefixes, pages=7, step_tokens=132)
    (_, request), got = answers(engine, [short, long], monkeypatch, new=6)
    assert request.preempted == 1 and request.cached_tokens == 640 and replayed == [256, 256]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_pages_are_of_one_tenant_salt_model_and_mode(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = oracle.tokens(40, 300, 256).tolist()

    def cached(prefixes: Prefixes, model: Model | None = None, *, invariant: bool = True) -> int:
        (request,), _ = answers(
            engine_of(model or model_of("v4"), prefixes, invariant=invariant), [prompt], monkeypatch
        )
        return request.cached_tokens

    own = patient(service, tenant="own")
    assert [cached(own), cached(own)] == [0, 256]
    assert cached(patient(service, tenant="other")) == 0
    assert cached(patient(service, tenant="own", salt="x")) == 0
    assert cached(own, model_of("v4", seed=12)) == 0
    assert cached(own, model_of("v4", "bf16")) == 0
    assert cached(own, invariant=False) == 0
    named = patient(service, tenant="own", revision="r1")
    assert [cached(named), cached(named, model_of("v4", seed=12))] == [0, 256]  # who names weights answers for it
    assert cached(own) == 256


def test_short_prompts_and_prompts_of_whole_pages_leave_a_token_to_compute(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = model_of("v3"), oracle.tokens(50, 256, 256).tolist()
    prefixes = patient(service)
    for _ in range(2):
        requests, got = answers(engine_of(model, prefixes), [ids, ids[:1], ids[:128]], monkeypatch)
    _, expected = answers(engine_of(model), [ids, ids[:1], ids[:128]], monkeypatch)
    assert [request.cached_tokens for request in requests] == [128, 0, 0]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("windows", ["half", "periodic", "periodic:100", "periodic:0", "periodic:-128", "full:1"])
def test_windows_are_one_of_three(windows: str) -> None:
    with pytest.raises(ConfigError, match="windows: "):
        Prefixes("127.0.0.1:1", windows=windows)


def test_replays_take_whole_pages_of_a_step(service: Service) -> None:
    with pytest.raises(ConfigError, match="step_tokens must be 132 or more"):
        engine_of(model_of("v4"), patient(service, windows="zero"), invariant=False, step_tokens=100)
