"""A service that does not answer is left alone for a while, and one client leaves room for the others.

Run: pytest tests/kvcache/test_breaker.py
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

import emberkv
import pytest
from emberfs.errors import DeadlineExceeded, LimitExceeded, Unavailable
from emberfs.testing.sim.loop import SimRuntime
from emberkv import pool as pools
from emberkv import puts
from emberkv.breaker import JITTER, Breaker, BreakerConfig
from emberkv.errors import BreakerOpen
from emberkv.keys import ROOT
from emberkv.puts import REFUSED, STORED
from hypothesis import given
from hypothesis import strategies as st

from tests.fs.sharing_run import stopped
from tests.kvcache.serving import Server
from tests.kvcache.test_pool import NAMESPACE, PAGE, TENANT, Bench, chain, run

CONFIG = BreakerConfig(failures=3, wait_s=1.0, wait_s_max=5.0)


class Circuit:
    """A breaker, its clock and its randomness."""

    def __init__(self, random: float = 0.0) -> None:
        self.now_s, self.random = 100.0, random
        self.breaker = Breaker(CONFIG, now_s=lambda: self.now_s, random=lambda: self.random)

    def fail(self, count: int = 1) -> None:
        for _ in range(count):
            assert self.breaker.admit()
            self.breaker.failed()


def test_failures_in_a_row_open_it_and_a_probe_closes_it() -> None:
    bench = Circuit()
    breaker = bench.breaker
    bench.fail(2)
    assert breaker.admit()
    breaker.succeeded()
    bench.fail(2)
    assert breaker.state == "closed" and breaker.admit()
    breaker.failed()
    assert breaker.state == "open" and not breaker.admit()
    bench.now_s += 1.0
    assert breaker.state == "half-open"
    assert breaker.admit() and not breaker.admit(), "one probe at a time"
    breaker.succeeded()
    assert breaker.state == "closed" and breaker.admit()
    assert breaker.figures() == {"state": "closed", "failures": 0, "opens_in_s": 0.0, "opened": 1, "refused": 2}


def test_each_probe_that_fails_doubles_the_time_up_to_its_limit() -> None:
    for random in (0.0, 0.5, 1.0):
        bench = Circuit(random)
        bench.fail(3)
        for wait_s in (1.0, 2.0, 4.0, 5.0, 5.0):
            wait_s *= 1 - JITTER * random
            assert bench.breaker.figures()["opens_in_s"] == pytest.approx(wait_s)
            bench.now_s += wait_s - 0.01
            assert not bench.breaker.admit()
            bench.now_s += 0.02
            bench.fail()


def test_calls_that_began_before_it_opened_change_nothing_but_by_success() -> None:
    bench = Circuit()
    breaker = bench.breaker
    assert all(breaker.admit() for _ in range(6))
    for _ in range(5):
        breaker.failed()
    assert breaker.figures()["opens_in_s"] == 1.0 and breaker.figures()["opened"] == 1
    breaker.succeeded()
    assert breaker.state == "closed"
    bench.fail(3)
    bench.now_s += 2
    assert breaker.admit()
    breaker.abandoned()
    assert breaker.state == "half-open" and breaker.admit(), "of a probe that was interrupted nothing is known"


@given(st.lists(st.tuples(st.sampled_from(["good", "bad"]), st.floats(0, 3), st.floats(0, 1)), max_size=60))
def test_it_never_asks_more_often_than_it_says(calls: list[tuple[str, float, float]]) -> None:
    bench = Circuit()
    in_a_row, last_s = 0, float("-inf")
    for outcome, later_s, random in calls:
        bench.now_s, bench.random = bench.now_s + later_s, random
        if not bench.breaker.admit():
            assert in_a_row >= CONFIG.failures and bench.now_s < last_s + CONFIG.wait_s_max
            continue
        if in_a_row >= CONFIG.failures:
            assert bench.now_s >= last_s + CONFIG.wait_s * (1 - JITTER)
        getattr(bench.breaker, "succeeded" if outcome == "good" else "failed")()
        in_a_row, last_s = (0, last_s) if outcome == "good" else (in_a_row + 1, bench.now_s)


def test_a_breaker_that_cannot_be_is_refused() -> None:
    for fields in ({"failures": 0}, {"wait_s": 0.0}, {"wait_s": 9.0, "wait_s_max": 8.0}):
        with pytest.raises(LimitExceeded):
            BreakerConfig(**fields)  # type: ignore[arg-type]


def test_a_service_that_hangs_costs_a_few_calls(serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch) -> None:
    service = serve()
    breaker = BreakerConfig(failures=2, wait_s=0.3, wait_s_max=0.6)
    with emberkv.connect(service.address, NAMESPACE, timeout_s=60, breaker=breaker) as cache:
        keys = cache.keys([1, 2])
        cache.put(keys, [b"x" * 100] * 2, durable="committed")
        hit = cache.match(keys)
        with stopped(service.process.pid), monkeypatch.context() as patch:
            patch.setattr(cache._caller, "timeout_s", 0.4)  # Only a service that does not answer is given so little.
            for _ in range(2):
                with pytest.raises((Unavailable, DeadlineExceeded)):
                    cache.match(keys)
            # Until a probe is let through, all are answered here; while it waits, the others are, too.
            with contextlib.suppress(Unavailable, DeadlineExceeded):
                missed = cache.match(keys)
                assert (missed.pages, missed.known_pages, missed.reason, missed.keys) == (0, 0, "no answer", [])
                assert cache.lookup(keys) == [None, None] and cache.exists(keys) == [False, False]
                assert cache.put(keys, [b"x" * 100] * 2) == ["refused"] * 2
                with pytest.raises(BreakerOpen):
                    cache.flush()
            assert cache.health["opened"] >= 1
            assert cache.get(hit) == [b"x" * 100] * 2, "pages are read from the store"
        ends_s = time.monotonic() + 30
        while cache.health["state"] != "closed" and time.monotonic() < ends_s:
            with contextlib.suppress(Unavailable, DeadlineExceeded):
                cache.match(keys)
            time.sleep(0.05)
        assert cache.match(keys).pages == 2
        assert cache.stat()["client"]["state"] == "closed"


# ---- what one client leaves for the others


def test_one_writer_reserves_no_more_than_its_share() -> None:
    async def work(runtime: SimRuntime) -> None:
        bench = Bench(runtime)
        pool = await bench.open()
        keys = chain(1, 1000)

        async def reserve(writer: int, keys: list[bytes]) -> tuple[int, list[int]]:
            number, states, _ = await pool.reserve(writer, TENANT, 0, keys, [ROOT] * len(keys), [PAGE] * len(keys))
            return number, states

        number, states = await reserve(1, keys)
        share = int(pool.space.live_bytes_max(PAGE) * puts.WRITER_SHARE)
        assert states.count(STORED) == share // (PAGE + 96)
        assert (await reserve(1, chain(2, 1)))[1] == [REFUSED]
        assert (await reserve(2, chain(3, 1)))[1] == [STORED], "there is room for others"
        pool.give_up(number, 1)
        assert (await reserve(1, chain(2, 1)))[1] == [STORED]
        pool.end_writer(1)
        pool.end_writer(2)
        assert not pool._puts._writers

    run(work)


def test_a_tenant_with_too_many_leases_gets_hits_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "LEASES_MAX", 3)

    async def work(runtime: SimRuntime) -> None:
        bench = Bench(runtime)
        pool = await bench.open()
        await bench.put(pool, chain(1, 2))
        leases = [pool.match(TENANT, b"".join(chain(1, 2)), 30)[2] for _ in range(5)]
        assert [lease > 0 for lease in leases] == [True] * 3 + [False] * 2
        assert pool.counts.unleased_hits == 2
        pool.leases.release(leases[:1], owner=TENANT)
        assert pool.match(TENANT, b"".join(chain(1, 2)), 30)[2] > 0
        await runtime.sleep(31)
        assert pool.leases.count_of(TENANT) == 0

    run(work)
