"""What a service counts, and how Prometheus, a dashboard and its alerts are told.

Run: pytest tests/kvcache/test_metrics.py
"""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import emberkv
from emberfs.testing.sim.loop import SimRuntime
from emberkv.counts import DEPARTED_SLOTS, Departed, ServiceCounts
from emberkv.figures import requests_of, stat_of
from emberkv.metrics import TENANTS_MAX, KvCollector
from emberkv.pool import Pool
from emberkv.segments import SECTOR_BYTES
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from tests.kvcache.serving import Server
from tests.kvcache.test_pool import NAMESPACE, TENANT, Bench, chain, run

DEPLOY = Path(__file__).parents[2] / "kvcache" / "deploy"
MIB = 1 << 20


def page_of(figures: dict[str, Any]) -> dict[str, float]:
    """What Prometheus reads: sample with labels -> value."""
    registry = CollectorRegistry()
    registry.register(KvCollector(lambda: figures))
    return samples_of(generate_latest(registry).decode())


def samples_of(text: str) -> dict[str, float]:
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()) if name != "namespace")
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def figures_of(pool: Pool, counts: ServiceCounts | None = None) -> dict[str, Any]:
    requests = requests_of(counts or ServiceCounts())
    return {"namespaces": {"n": stat_of(pool, {})}, "seats": 1, "opening": [], "requests": requests}


def test_a_match_says_why_it_is_no_longer() -> None:
    async def work(runtime: SimRuntime) -> None:
        bench = Bench(runtime, ttl_s=1000)
        pool = await bench.open()

        def why(keys: list[bytes]) -> tuple[int, str]:
            slots, reason, _ = pool.match(TENANT, b"".join(keys), 0)
            return len(slots), reason

        keys, other = chain(1, 6), chain(2, 4)
        assert why(keys) == (0, "absent")
        await bench.put(pool, keys[:4])
        assert why(keys[:4]) == (4, "whole")
        number, _, _ = await pool.reserve(1, TENANT, 0, keys[4:], keys[3:5], [100, 100])
        assert why(keys) == (4, "pending")
        pool.give_up(number, 1)
        await bench.put(pool, other[1:], parent=other[0])
        assert why(other) == (0, "absent")
        assert why(other[1:]) == (0, "parent missing")
        assert await pool.remove(TENANT, keys[2:3]) == 1
        assert why(keys) == (2, "removed")
        place = pool.table.place(pool.table.slot(TENANT, keys[1]) or 0, 0)
        assert place is not None
        bench.files.files[pool.space.path(place.segment)][place.offset + 200] ^= 1
        assert await pool.report(TENANT, 0, keys[1:2]) == 1
        assert why(keys) == (1, "damaged")
        await runtime.sleep(1010)
        assert why(keys) == (0, "expired")
        for prompt in range(3, 90):
            await bench.put(pool, chain(prompt, 8))
        assert why(chain(3, 8)) == (0, "evicted")
        places, _ = pool.lookup(TENANT, 0, [*chain(89, 2), keys[0], chain(3, 1)[0]], 0)
        assert len(places) == 4 and (pool.counts.looked_up_pages, pool.counts.found_pages) == (4, 2)
        assert pool.counts.misses == {"expired": 1, "evicted": 1}
        assert pool.counts.stops == {
            "absent": 2, "whole": 1, "pending": 1, "parent missing": 1, "removed": 1, "damaged": 1, "expired": 1,
            "evicted": 1,
        }  # fmt: skip

    run(work)


def test_the_page_has_what_there_is_and_what_was_done() -> None:
    async def work(runtime: SimRuntime) -> None:
        bench = Bench(runtime)
        pool = await bench.open()
        keys = chain(1, 10)
        await bench.put(pool, keys)
        pool.pin(TENANT, keys[:3], 60)
        pool.match(TENANT, b"".join([*keys[:5], *chain(2, 1)]), 30.0)
        await pool.remove(TENANT, keys[8:])
        counts = ServiceCounts()
        counts.served("Match", 0.0001)
        counts.served("Match", 0.5, "SeatGone")
        page = page_of(figures_of(pool, counts))
        assert page["emberline_kv_pages"] == 8 and page["emberline_kv_pinned_pages"] == 3
        assert page["emberline_kv_live_bytes"] == 8 * (9000 + 96)
        assert 0 <= page["emberline_kv_dead_bytes"] - 2 * (9000 + 96) < SECTOR_BYTES  # And what fills the last one up.
        assert page["emberline_kv_leases"] == 1 and page["emberline_kv_owned"] == 1
        assert page["emberline_kv_asked_pages_total"] == 6 and page["emberline_kv_hit_pages_total"] == 5
        assert page["emberline_kv_match_ends_total{reason=absent}"] == 1
        assert page["emberline_kv_put_pages_total{outcome=stored}"] == 10
        assert page["emberline_kv_put_bytes_total"] == 90_000
        assert page["emberline_kv_gone_pages_total{cause=removed}"] == 2
        assert page["emberline_kv_segments{state=open}"] == 1
        assert page["emberline_kv_tenant_bytes{tenant=tenant}"] == 8 * (9000 + 96)
        assert page["emberline_kv_request_seconds_count{request=Match}"] == 2
        assert page["emberline_kv_request_errors_total{error=SeatGone,request=Match}"] == 1
        for number in range(TENANTS_MAX + 5):
            pool.tenant(f"t{number}")
        told = [name for name in page_of(figures_of(pool)) if name.startswith("emberline_kv_tenant_bytes")]
        assert len(told) == TENANTS_MAX and "emberline_kv_tenant_bytes{tenant=tenant}" in told
        bench.kill(pool)

    run(work)


def test_a_namespace_that_comes_back_goes_on_counting() -> None:
    counts = ServiceCounts()
    counts.namespace("n").matches += 3
    assert counts.namespace("n").matches == 3 and counts.namespace("m").matches == 0


def test_a_younger_key_takes_the_place_of_an_older_one() -> None:
    departed = Departed()
    one, two = bytes(3) + b"\1" + b"a" * 28, bytes(3) + b"\1" + b"b" * 28
    departed.note(one, "evicted")
    assert departed.cause(one) == "evicted" and departed.cause(two) is None
    departed.note(two, "expired")
    assert departed.cause(one) is None and departed.cause(two) == "expired"
    assert departed.cause(bytes(32)) is None and DEPARTED_SLOTS % 2 == 0


def test_a_service_serves_the_page(serve: Callable[..., Server]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    server = serve(more=("--metrics", address))
    with emberkv.connect(server.address, NAMESPACE) as cache:
        keys = cache.keys([1, 2, 3])
        cache.put(keys, [b"x" * 1000] * 3, durable="committed")
        cache.match(keys)
        text = urlopen(f"http://{address}/metrics", timeout=10).read().decode()
        page = samples_of(text)
        assert page["emberline_kv_pages"] == 3 and page["emberline_kv_seats"] == 1
        assert page["emberline_kv_request_seconds_count{request=Match}"] == 1
        assert page["emberline_kv_match_ends_total{reason=whole}"] == 1
        assert f'namespace="{NAMESPACE.name}"' in text


def test_what_the_dashboard_and_the_alerts_ask_for_is_on_the_page() -> None:
    async def work(runtime: SimRuntime) -> None:
        bench = Bench(runtime)
        counts = ServiceCounts()
        counts.served("Match", 0.1, "SeatGone")
        pool = await bench.open()
        pool.match(TENANT, b"".join(chain(1, 1)), 0)
        pool.lookup(TENANT, 0, chain(1, 1), 0)
        await bench.put(pool, chain(1, 1))
        there = {re.sub(r"\{.*", "", name) for name in page_of(figures_of(pool, counts))}
        dashboard = json.loads((DEPLOY / "grafana.json").read_text())
        asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
        alerts = (DEPLOY / "alerts.yaml").read_text()
        assert "looked_up_pages" in alerts and "found_pages" in alerts  # Adapters look pages up, and match nothing.
        asked.append(alerts)
        names = {name for text in asked for name in re.findall(r"emberline_kv_\w+", text)}
        assert len(names) > 20 and names <= there
        bench.kill(pool)

    run(work)
