"""`emberline kv top` tells rates of what happened between two looks. Run: pytest tests/kvcache/test_top.py"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import emberkv
import msgspec
import pytest
from emberfs.histogram import Histogram
from emberfs.testing.sim.loop import SimRuntime
from emberkv.counts import ServiceCounts
from emberkv.figures import requests_of, stat_of

from emberline.kvtop import Interval, tables
from tests.fs.cli_run import emberline, start_emberline
from tests.kvcache.serving import Server
from tests.kvcache.test_pool import NAMESPACE, TENANT, Bench, chain, run


def test_rates_are_those_of_the_interval() -> None:
    async def work(runtime: SimRuntime) -> None:
        bench, counts = Bench(runtime), ServiceCounts()
        pool = await bench.open()

        def look() -> dict[str, Any]:
            told = {"namespaces": {"n": stat_of(pool, {})}, "requests": requests_of(counts), "wall_s": 0.0}
            return json.loads(json.dumps(told))  # type: ignore[no-any-return]

        await bench.put(pool, chain(1, 4))
        counts.served("Match", 5.0)
        before = look()
        await bench.put(pool, chain(2, 6))
        pool.match(TENANT, b"".join(chain(2, 10)), 30.0)
        pool.match(TENANT, b"".join(chain(1, 2)), 0)
        counts.served("Match", 0.001)
        counts.served("Open", 0.01, "AccessDenied")
        interval = Interval(seconds=2.0, before=before, now=look())
        (row,) = interval.namespaces()
        assert (row["asked_per_s"], row["hit_per_s"], row["stored_per_s"], row["leases"]) == (6.0, 4.0, 3.0, 1)
        assert row["stops"] == {"absent": 0.5, "whole": 0.5} and row["put_bytes_per_s"] == 27_000
        match, opened = interval.requests()
        assert match["per_s"] == 0.5 and match["max_s"] < 0.01 and opened["errors_per_s"] == 0.5
        spaces, ends, asked = tables(interval)
        assert spaces[1][:4] == ["n", "6", "66.7%", "3"] and ["n: absent", "0.5"] in ends and len(asked) == 3
        fresh = Interval(seconds=1.0, before={"namespaces": {}, "requests": {}}, now=before)
        assert next(fresh.namespaces())["stored_per_s"] == 4
        bench.kill(pool)

    run(work)
    assert msgspec.convert(msgspec.to_builtins(Histogram(), str_keys=True), Histogram, strict=False) == Histogram()


def test_top_of_a_service(serve: Callable[..., Server], tmp_path: Path) -> None:
    tenants = tmp_path / "tenants.json"
    server = serve()
    with emberkv.connect(server.address, NAMESPACE) as cache:
        keys = cache.keys(range(8))
        cache.put(keys, [b"x" * 1000] * 8, durable="committed")
        program = start_emberline("kv", "top", "--interval", "0.5", "--json", "--address", server.address)
        ended = threading.Timer(60, program.kill)
        ended.start()
        assert program.stdout is not None
        # Its first look has been when the first interval is told.
        row = json.loads(program.stdout.readline())
        assert row["namespace"] == NAMESPACE.name and row["pages"] == 8
        cache.match(keys)
        while not (row.get("request") == "Match" or row.get("asked_per_s")):
            row = json.loads(program.stdout.readline())
        program.kill()
        program.communicate()
        ended.cancel()
        said = emberline("kv", "top", "--interval", "0.1", "--count", "1", "--address", server.address).stdout
        assert NAMESPACE.name in said and "Stat" in said
    server.end()
    tenants.write_text(json.dumps({"tenants": {}, "operators": []}))
    locked = serve(tenants=str(tenants))
    assert emberline("kv", "top", "--count", "1", "--address", locked.address, code=1).stderr


@pytest.mark.parametrize("now", [5, 3])
def test_a_service_that_began_anew_counts_from_nothing(now: int) -> None:
    assert Interval(seconds=1.0, before={}, now={})._grown(now, 4) == (1 if now == 5 else 3)
