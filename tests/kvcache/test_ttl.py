"""How long pages stay that nobody uses: a page as long as any below it, a tenant's by its own time.

Run: pytest tests/kvcache/test_ttl.py
"""

from __future__ import annotations

import json
from collections.abc import Callable

import emberkv
import pytest
from emberfs.errors import LimitExceeded
from emberfs.testing.sim.loop import SimRuntime
from emberkv.keys import ROOT, page_keys
from emberkv.pool import Pool
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.fs.cli_run import emberline
from tests.kvcache.serving import Server
from tests.kvcache.test_pool import NAMESPACE, Bench, run

HOUR_S = 3600.0
TENANTS = ("short", "usual", "long")
TTLS_S = (100.0, 300.0, 3 * HOUR_S)
PATHS = st.lists(st.integers(0, 1), min_size=1, max_size=3)
ACTIONS = st.sampled_from(["put", "match", "wait", "remove"])
STEPS = st.lists(
    st.tuples(ACTIONS, st.sampled_from([0, 1]), PATHS, st.sampled_from([20, 60, 90, 150])),
    min_size=1, max_size=30,
)  # fmt: skip


def keys_of(tenant: str, path: list[int]) -> list[bytes]:
    return page_keys(NAMESPACE, path, tenant=tenant)


async def put(pool: Pool, tenant: int, keys: list[bytes]) -> None:
    number, _, places = await pool.reserve(1, tenant, 0, keys, [ROOT, *keys[:-1]], [100] * len(keys))
    if number:
        pool.commit(number, 1, [0] * sum(place is not None for place in places))


async def opened(bench: Bench) -> Pool:
    pool = await Pool.open(bench.files, bench.runtime, "/ns", NAMESPACE, config=bench.config, address="here")
    assert [pool.tenant(name) for name in TENANTS] == [0, 1, 2]
    return pool


@example([("put", 0, [0, 0], 20), ("wait", 0, [1], 60), ("remove", 0, [0, 0], 20), ("wait", 0, [1], 60)])
@given(STEPS)
@settings(max_examples=150, deadline=None)
def test_a_page_stays_as_long_as_any_below_it(steps: list[tuple[str, int, list[int], int]]) -> None:
    """Time is of a page's own use and of all below it: the page before another never goes first."""
    used_s: dict[tuple[int, tuple[int, ...]], float] = {}

    def last_s(tenant: int, path: tuple[int, ...]) -> float:
        return max(s for (of, each), s in used_s.items() if of == tenant and each[: len(path)] == path)

    async def work(runtime: SimRuntime) -> None:
        bench = Bench(runtime, ttl_s=TTLS_S[1])
        pool = await opened(bench)
        pool.set_ttl(0, TTLS_S[0])
        for action, tenant, path, wait_s in steps:
            keys = keys_of(TENANTS[tenant], path)
            there = pool.match(tenant, b"".join(keys), 0)[0]
            now_s = pool.space.stamp_s()
            if len(there):
                used_s[tenant, tuple(path[: len(there)])] = now_s
            if action == "put":
                await put(pool, tenant, keys)
                used_s.update({(tenant, tuple(path[: n + 1])): now_s for n in range(len(path))})
            elif action == "remove" and len(there) == len(path):
                await pool.remove(tenant, keys[-1:])
                left_s = last_s(tenant, tuple(path))
                for gone in [at for at in used_s if at[0] == tenant and at[1][: len(path)] == tuple(path)]:
                    del used_s[gone]
                if path[1:]:
                    used_s[tenant, tuple(path[:-1])] = left_s
            elif action == "wait":
                await runtime.sleep(wait_s)
            now_s = pool.space.stamp_s()
            for of, each in list(used_s):
                ends_s = last_s(of, each) + TTLS_S[of]
                slot = pool.table.any_slot(of, keys_of(TENANTS[of], list(each))[-1])
                if ends_s > now_s:
                    assert slot is not None, f"{each} of {TENANTS[of]} went {ends_s - now_s} s too early"
                elif ends_s < now_s - 2:
                    assert slot is None, f"{each} of {TENANTS[of]} is there {now_s - ends_s} s too long"
                if slot is not None:
                    above = [pool.table.slot(of, key) for key in keys_of(TENANTS[of], list(each))]
                    assert None not in above, "what a page hangs on is there"
            for gone in [at for at in used_s if last_s(*at) + TTLS_S[at[0]] < now_s - 2]:
                del used_s[gone]

    run(work)


def test_times_of_tenants_and_namespace_survive_a_restart() -> None:
    async def work(runtime: SimRuntime) -> None:
        bench = Bench(runtime, ttl_s=TTLS_S[1])
        pool = await opened(bench)
        pool.set_ttl(None, 200.0)
        pool.set_ttl(2, TTLS_S[2])
        await put(pool, 2, keys_of("long", [1, 2]))
        await put(pool, 1, keys_of("usual", [1, 2]))
        await pool.close()
        for _ in range(2):  # Out of the log, and out of the snapshot that an owner begins with.
            pool = await opened(bench)
            assert [pool.space.ttl_s(tenant) for tenant in (None, 0, 1, 2)] == [200.0, 200.0, 200.0, TTLS_S[2]]
            await pool.close()
        pool = await opened(bench)
        await runtime.sleep(2.9 * HOUR_S)
        assert len(pool.match(2, b"".join(keys_of("long", [1, 2])), 0)[0]) == 2 and pool.table.count == 2
        pool.set_ttl(2, 0)
        assert pool.space.ttl_s(2) == 200.0
        await runtime.sleep(202)
        assert pool.table.count == 0

    run(work)


def test_an_operator_sets_times(serve: Callable[..., Server]) -> None:
    address = serve(more=("--ttl-hours", "48")).address
    with emberkv.connect(address, NAMESPACE, tenant="acme") as cache, emberkv.Operator(address) as operator:
        name = NAMESPACE.name
        assert cache.stat()["namespaces"][name]["tenants"]["acme"]["ttl_s"] == 48 * HOUR_S
        emberline("kv", "ttl", name, "30d", "--tenant", "acme", "--address", address)
        emberline("kv", "ttl", name, "12h", "--address", address)
        numbers = json.loads(emberline("kv", "stat", "--address", address, "--json").stdout)["namespaces"][name]
        assert (numbers["ttl_s"], numbers["tenants"]["acme"]["ttl_s"]) == (12 * HOUR_S, 30 * 24 * HOUR_S)
        assert "as long as before" in emberline("kv", "ttl", name, "0", "--address", address).stderr
        assert cache.stat()["namespaces"][name]["ttl_s"] == 48 * HOUR_S
        with pytest.raises(LimitExceeded):
            operator.set_ttl(name, -1.0)
