"""Prefix reuse when something goes wrong: what is damaged, gone or does not answer is computed, and nobody is told an
error. Run: pytest tests/trainer/test_prefix_mishaps.py."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import emberfs
import emberkv
import pytest
import torch
from emberkv.operator import Operator
from emberkv.page import places_of
from embertrain.engine import Sampling
from embertrain.errors import NotFinite
from embertrain.model.model import Model
from embertrain.model.presets import preset
from embertrain.prefix import Prefixes, reading, writing
from torch import Tensor

from . import oracle
from .prefix_lab import Service, answers, engine_of, model_of, patient, recorded, serving

PROMPT = oracle.tokens(60, 1000, 256).tolist()
PAGES = 7
STRATEGIES = ["full", "periodic:256", "zero"]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with serving(tmp_path_factory.mktemp("mishaps")) as running:
        yield running


@pytest.fixture
def cold(monkeypatch: pytest.MonkeyPatch) -> Tensor:
    _, (rows,) = answers(engine_of(model_of("v4")), [PROMPT], monkeypatch)
    return rows


class Stored:
    """The pages of PROMPT, once a request has left them."""

    def __init__(self, service: Service, prefixes: Prefixes, monkeypatch: pytest.MonkeyPatch) -> None:
        self.service, self.prefixes, self.model = service, prefixes, model_of("v4")
        engine = engine_of(self.model, prefixes)
        assert engine.reuse is not None
        self.namespace = engine.reuse.namespace
        answers(engine, [PROMPT], monkeypatch)

    def cache(self) -> emberkv.KVCache:
        return emberkv.connect(self.service.address, self.namespace, salt=self.prefixes.salt.encode())

    def damage(self, kind: str, page: int) -> None:
        """Another byte in the middle of a page, where the store has it."""
        with self.cache() as cache, emberfs.connect(self.service.store) as client:
            hit = cache.match(cache.keys(PROMPT[: PAGES * 128]), lease_s=0)
            place = places_of(hit.places[[each.name for each in self.namespace.kinds].index(kind)])[page]
            with client.open(f"/kv/{self.namespace.name}/segments/{place.segment:08x}", "r+b") as file:
                file.seek((place.offset + place.end) // 2)
                (byte,) = file.read(1)
                file.seek((place.offset + place.end) // 2)
                file.write(bytes([byte ^ 1]))

    def cached(self, monkeypatch: pytest.MonkeyPatch, cold: Tensor) -> int:
        """Pages that a request begins with; it goes on as one that has none."""
        (request,), (got,) = answers(engine_of(self.model, self.prefixes), [PROMPT], monkeypatch)
        assert torch.equal(got, cold)
        return request.cached_tokens // 128

    def cached_in_the_end(self, monkeypatch: pytest.MonkeyPatch, cold: Tensor) -> int:
        """The same, once the service has looked at what was reported, and the pages were put again."""
        soon = time.monotonic() + 60
        while (pages := self.cached(monkeypatch, cold)) < PAGES and time.monotonic() < soon:
            pass
        return pages


@pytest.mark.parametrize(
    ("windows", "kind", "page", "left"),
    [
        ("full", "rows", 5, 5),
        ("full", "rows", 0, 0),
        ("full", "states", 6, 6),
        ("periodic:256", "rows", 5, 4),
        ("periodic:256", "states", 6, 6),
        ("zero", "rows", 6, 6),
        ("zero", "rows", 2, 0),
    ],
)
def test_a_damaged_page_is_computed_and_stored_again(
    service: Service, windows: str, kind: str, page: int, left: int, monkeypatch: pytest.MonkeyPatch, cold: Tensor
) -> None:
    stored = Stored(service, patient(service, windows=windows, salt=f"{windows} {kind} {page}"), monkeypatch)
    assert stored.cached(monkeypatch, cold) == PAGES
    stored.damage(kind, page)
    assert stored.cached(monkeypatch, cold) == left
    assert stored.cached_in_the_end(monkeypatch, cold) == PAGES


@pytest.mark.parametrize("windows", STRATEGIES)
def test_what_was_evicted_is_computed_and_stored_again(
    service: Service, windows: str, monkeypatch: pytest.MonkeyPatch, cold: Tensor
) -> None:
    stored = Stored(service, patient(service, windows=windows, tenant=f"small {windows}"), monkeypatch)
    name = stored.namespace.name
    rows, *states = (kind.payload_bytes + 96 for kind in stored.namespace.kinds)
    with Operator(service.address) as operator:
        # Room for some of the pages: the end of the chain goes first.
        operator.set_quota(name, stored.prefixes.tenant, 5 * rows + 4 * sum(states))
        operator.collect(name)
        left = stored.cached(monkeypatch, cold)
        assert (windows == "periodic:256") <= left < PAGES
        operator.set_quota(name, stored.prefixes.tenant, 0)
    assert stored.cached_in_the_end(monkeypatch, cold) == PAGES


def test_a_page_that_goes_between_match_and_read_is_a_miss(
    service: Service, monkeypatch: pytest.MonkeyPatch, cold: Tensor
) -> None:
    stored = Stored(service, patient(service, salt="gone"), monkeypatch)
    read = emberkv.KVCache.get_into
    gone = []

    def get_into(cache: emberkv.KVCache, hit: emberkv.Hit, buffers: list[memoryview], **how: object) -> list[bool]:
        done = read(cache, hit, buffers, **how)  # type: ignore[arg-type]
        if how["kind"] == "rows" and not gone:
            gone.append(len(done))
            done[3:] = [False] * len(done[3:])  # as a reader finds it whose segment was removed
        return done

    monkeypatch.setattr(emberkv.KVCache, "get_into", get_into)
    assert stored.cached(monkeypatch, cold) == 3 and gone == [7]
    assert stored.cached(monkeypatch, cold) == PAGES


@pytest.mark.parametrize(("windows", "left"), [("full", 3), ("periodic:256", 2)])
def test_reads_of_a_hit_have_one_deadline_together(
    service: Service, windows: str, left: int, monkeypatch: pytest.MonkeyPatch, cold: Tensor
) -> None:
    stored = Stored(service, patient(service, windows=windows, salt=f"slow {windows}"), monkeypatch)
    read, clock = emberkv.KVCache.get_into, SimpleNamespace(now_s=0.0)

    def get_into(cache: emberkv.KVCache, hit: emberkv.Hit, buffers: list[memoryview], **how: object) -> list[bool]:
        clock.now_s += 0.4 * stored.prefixes.timeout_s * (how["kind"] == "rows")
        return read(cache, hit, buffers, **how)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(emberkv.KVCache, "get_into", get_into)
        patch.setattr(reading, "READ_BYTES", 1)  # a page a read
        patch.setattr(reading, "time", SimpleNamespace(monotonic=lambda: clock.now_s))
        assert stored.cached(monkeypatch, cold) == left
    assert stored.cached(monkeypatch, cold) == PAGES


def test_a_service_that_is_not_there_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, cold: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    prefixes = Prefixes("127.0.0.1:1", timeout_s=0.3)
    engine = engine_of(model_of("v4"), prefixes)
    (request, again), got = answers(engine, [PROMPT, PROMPT], monkeypatch)
    assert all(torch.equal(rows, cold) for rows in got)
    assert request.cached_tokens == again.cached_tokens == 0
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert engine.reuse is not None and engine.reuse.counts.refused_pages > 0


@pytest.mark.parametrize("windows", STRATEGIES)
def test_a_service_that_is_killed_costs_time_only(
    windows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cold: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    model = model_of("v4")
    with serving(tmp_path) as service:
        prefixes = patient(service, windows=windows)
        answers(engine_of(model, prefixes), [PROMPT], monkeypatch)
        engine = engine_of(model, prefixes)
        assert engine.reuse is not None
        cache, restore = engine.reuse._door._cache, engine.reuse.restore
        assert cache is not None

        def restored(*asked: Any) -> Any:
            trail = restore(*asked)
            cache._caller.timeout_s = 0.5  # The first one may take its time; who is killed is not waited for.
            return trail

        monkeypatch.setattr(engine.reuse, "restore", restored)
        with recorded(monkeypatch) as rows:
            first = engine.submit(PROMPT, Sampling(seed=0), max_new_tokens=4)
            other = engine.submit([*PROMPT[:300], *PROMPT[:500]], Sampling(seed=1), max_new_tokens=4)
            engine.step()
            service.server.end(signal.SIGKILL)
            third = engine.submit(PROMPT, Sampling(seed=2), max_new_tokens=4)
            while not engine.idle:
                engine.step()
            engine.close()
    assert first.cached_tokens == PAGES * 128 and other.finish == third.finish == "length"
    assert torch.equal(torch.stack(rows[0]), cold) and torch.equal(torch.stack(rows[2]), cold)
    assert sum("what it would have had is computed" in record.message for record in caplog.records) <= 1


def test_a_replay_sees_nothing_of_who_had_its_place_before(
    service: Service, monkeypatch: pytest.MonkeyPatch, cold: Tensor
) -> None:
    """Windows that begin empty hold zeros, and not what another request left there: NaN, here."""
    stored = Stored(service, patient(service, windows="zero", salt="nan"), monkeypatch)
    engine = engine_of(stored.model, stored.prefixes)
    for layer, rows in enumerate(engine.cache.spec.layers):
        for row in rows:
            engine.cache.pool(layer, row.kind).fill_(torch.nan)
    (request,), (got,) = answers(engine, [PROMPT], monkeypatch)
    assert request.cached_tokens == PAGES * 128 and torch.equal(got, cold)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """No page is put before this is set."""
    put, may_go = emberkv.KVCache.put, threading.Event()

    def wait(cache: emberkv.KVCache, *pages: Any, **how: Any) -> list[str]:
        assert may_go.wait(60)
        return put(cache, *pages, **how)

    monkeypatch.setattr(emberkv.KVCache, "put", wait)
    yield may_go
    may_go.set()


@pytest.mark.parametrize("invariant", [True, False])
def test_rows_that_are_not_finite_are_kept_for_nobody(service: Service, invariant: bool, held: threading.Event) -> None:
    """They come in the middle of a prompt, whose chunks have no logits: the pages before them are good, and are put
    even if the thread that does so comes to them later."""
    model = Model(preset("micro"), mtp=False)
    oracle.randomise(model, 11)
    prompt = [token % 255 for token in PROMPT]
    prompt[3 * 128 + 5] = 255
    with torch.no_grad():
        model.embed.weight[255] = torch.nan
    prefixes = patient(service, revision="nan", salt=f"not finite {invariant}")
    for pages in (0, 3):
        engine = engine_of(model, prefixes, invariant=invariant, step_tokens=256)
        request = engine.submit(prompt, max_new_tokens=1)
        with pytest.raises(NotFinite):
            while not engine.idle:
                engine.step()
        held.set()
        engine.close()
        assert request.cached_tokens == pages * 128


def test_pages_there_is_no_room_for_cost_none_of_those_that_wait(
    service: Service, monkeypatch: pytest.MonkeyPatch, cold: Tensor, held: threading.Event
) -> None:
    model, prefixes = model_of("v4"), patient(service, salt="crowded")
    engine = engine_of(model, prefixes)
    assert engine.reuse is not None
    rows, *states = (kind.payload_bytes for kind in engine.reuse.namespace.kinds)
    monkeypatch.setattr(writing, "PENDING_BYTES_MAX", 2 * (rows + sum(states)))
    engine.submit(PROMPT, max_new_tokens=1)
    while not engine.idle:
        engine.step()
    held.set()
    engine.close()
    (request,), (got,) = answers(engine_of(model, prefixes), [PROMPT], monkeypatch)
    assert request.cached_tokens == 2 * 128 and torch.equal(got, cold)


def test_what_cannot_be_put_at_all_is_said_and_nothing_behind_it_is_put(
    service: Service, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    put, calls = emberkv.KVCache.put, []

    def fail(cache: emberkv.KVCache, *pages: Any, **how: Any) -> list[str]:
        calls.append(how["kind"])
        if len(calls) == 3:  # The rows of the second page.
            raise RuntimeError("a mistake of ours")
        return put(cache, *pages, **how)

    monkeypatch.setattr(emberkv.KVCache, "put", fail)
    prefixes = patient(service, salt="a mistake")
    engine = engine_of(model_of("v4"), prefixes)
    answers(engine, [PROMPT], monkeypatch)
    assert calls == ["rows", "states", "rows"]
    assert [each.message for each in caplog.records] == ["pages 1 to 2 could not be put"]
    caplog.clear()
    (request,), _ = answers(engine_of(model_of("v4"), prefixes), [PROMPT], monkeypatch)
    assert request.cached_tokens == 128
