"""Where the time of a request goes: the stages add up, what overlaps is counted once, and servers can be asked.

Run: pytest tests/fs/test_meter.py
"""

from __future__ import annotations

import asyncio
import math
import re
import threading
from collections.abc import Awaitable, Iterator, Sequence
from pathlib import Path

import emberfs
import pytest
from emberfs import Client
from emberfs.errors import NotFound
from emberfs.ledger import ClientStats
from emberfs.messages import Done, Message, MeterRead, Once, ReadMeter, Stat, Truncate
from emberfs.meter import STAGES, KindStats, Meter
from emberfs.portal import Portal
from emberfs.runtime import AsyncioRuntime
from emberfs.server.metrics import MeterCollector, Metered
from emberfs.stopwatch import Stopwatch, current
from emberfs.transport import TcpNetwork
from emberfs.transport.codec import encode_message, kind_of
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest

CLOCK_S = st.floats(0, 10)


class Clock:
    """Goes on when it is told to."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@given(st.lists(st.tuples(CLOCK_S, st.sampled_from(["disk", "servers"]), st.booleans()), max_size=30))
def test_what_overlaps_is_counted_once_and_as_the_disks(steps: list[tuple[float, str, bool]]) -> None:
    clock = Clock()
    watch = Stopwatch(clock)
    under_way = {"disk": 0, "servers": 0}
    expected = {"disk": 0.0, "servers": 0.0}
    for seconds, what, begins in steps:
        clock.now_s += seconds
        waits = "disk" if under_way["disk"] else "servers" if under_way["servers"] else ""
        if waits:
            expected[waits] += seconds
        if begins:
            under_way[what] += 1
            watch.begin_disk() if what == "disk" else watch.begin_servers()
        elif under_way[what]:
            under_way[what] -= 1
            watch.end_disk() if what == "disk" else watch.end_servers()
    total_s = watch.stop()
    assert math.isclose(total_s, sum(seconds for seconds, _, _ in steps), abs_tol=1e-6)
    assert math.isclose(watch.disk_s, expected["disk"], abs_tol=1e-6)
    assert math.isclose(watch.servers_s, expected["servers"], abs_tol=1e-6)


def test_the_stages_add_up_to_the_whole() -> None:
    clock = Clock()
    meter = Meter(clock)
    for number in range(5):
        arrived_s = clock.now_s
        clock.now_s += 1
        watch = meter.watch()
        clock.now_s += 2
        watch.begin_servers()
        clock.now_s += 4
        watch.begin_disk()
        clock.now_s += 8
        watch.end_disk()
        watch.end_servers()
        error = "NotFound" if number == 4 else ""
        meter.record("Stat", watch, arrived_s=arrived_s, payload_bytes=7, error=error)
    stats = meter.kinds["Stat"]
    assert stats.whole.total_s == pytest.approx(5 * 15)
    assert [stats.stage(name).total_s for name in STAGES] == pytest.approx([5.0, 40.0, 20.0, 10.0])
    assert (stats.whole.count, stats.payload_bytes, stats.errors) == (5, 35, {"NotFound": 1})


def test_a_difference_and_a_merge_of_kinds_are_each_others_opposite() -> None:
    clock = Clock()
    meter = Meter(clock)

    def serve(error: str) -> None:
        watch = meter.watch()
        clock.now_s += 1
        meter.record("Stat", watch, arrived_s=watch.began_s, payload_bytes=3, error=error)

    serve("NotFound")
    before = KindStats()
    before.merge(meter.kinds["Stat"])
    serve("")
    serve("NotFound")
    came = meter.kinds["Stat"].since(before)
    assert (came.whole.count, came.whole.total_s, came.payload_bytes, came.errors) == (2, 2.0, 6, {"NotFound": 1})
    before.merge(came)
    assert before == meter.kinds["Stat"]


def test_a_change_is_counted_under_what_is_inside() -> None:
    inside = Truncate("/a", 1, 2)
    assert kind_of(Once(b"c" * 16, 1, 1, encode_message(inside))) == "Truncate"
    assert kind_of(Stat("/")) == "Stat"
    assert kind_of(Once(b"c" * 16, 1, 1, b"")) == ""


class Slow:
    """A service that waits for what it is told to, or refuses."""

    def handle(self, request: Message, buffers: Sequence[memoryview] = ()) -> Awaitable[Message]:
        return self._serve(request)

    async def _serve(self, request: Message) -> Message:
        watch = current.get()
        assert watch is not None
        if isinstance(request, Stat) and request.path == "/no":
            raise NotFound("no", "/no")
        watch.begin_disk()
        await asyncio.sleep(0.02)
        watch.end_disk()
        return Done()


@pytest.fixture
def portal() -> Iterator[Portal]:
    runtime = AsyncioRuntime()
    yield Portal(runtime)
    runtime.stop()


def test_a_server_tells_what_it_served(portal: Portal, tmp_path: Path) -> None:
    network = TcpNetwork(portal._runtime)
    address = f"unix:{tmp_path}/s"
    portal.run(network.serve(address, Metered(Slow(), network.meter)))
    connection = network.connection(address)
    for _ in range(3):
        portal.run(connection.call(Stat("/")))
    with pytest.raises(NotFound):
        portal.run(connection.call(Stat("/no")))
    read = portal.run(connection.call(ReadMeter()))
    assert isinstance(read, MeterRead)
    stats = read.kinds["Stat"]
    assert (stats.whole.count, stats.disk.count, stats.errors) == (4, 3, {"NotFound": 1})
    assert stats.disk.total_s >= 3 * 0.019
    assert sum(stats.stage(name).total_s for name in STAGES) == pytest.approx(stats.whole.total_s, abs=1e-6)
    portal.run(network.close())


def test_the_page_has_histograms(portal: Portal, tmp_path: Path) -> None:
    clock = Clock()
    meter = Meter(clock)
    watch = meter.watch()
    clock.now_s += 0.003
    meter.record("ReadChunks", watch, arrived_s=watch.began_s, payload_bytes=4096, error="Corruption")
    registry = CollectorRegistry()
    registry.register(MeterCollector(meter))
    page = generate_latest(registry).decode()
    assert 'emberline_request_seconds_bucket{le="0.001953125",request="ReadChunks"} 0.0' in page
    assert 'emberline_request_seconds_bucket{le="0.00390625",request="ReadChunks"} 1.0' in page
    assert 'emberline_request_seconds_count{request="ReadChunks"} 1.0' in page
    assert re.search(r'emberline_request_stage_seconds_sum\{request="ReadChunks",stage="work"\} 0\.00[23]', page)
    assert 'emberline_request_stage_seconds_count{request="ReadChunks",stage="disk"} 0.0' in page
    assert 'emberline_request_errors_total{error="Corruption",request="ReadChunks"} 1.0' in page
    assert 'emberline_payload_bytes_total{request="ReadChunks"} 4096.0' in page


# ---- what a client tells


def test_a_client_tells_what_it_did(client: Client) -> None:
    client.put("/a", b"x" * 100_000)
    for _ in range(600):
        client.stat("/a")
    with pytest.raises(NotFound):
        client.stat("/b")
    with client.open("/a") as file:
        file.read()
    stats = client.stats()
    assert stats.operations["put"].count == 1
    assert (stats.operations["stat"].count, stats.operations["stat"].errors) == (601, 1)
    assert stats.operations["file.read"].count == 1
    assert stats.requests == {}
    one = stats.operations["put"]
    assert one.total_s == pytest.approx(one.client_s) and one.max_s >= one.p99_s >= one.p50_s > 0


def test_every_call_of_every_thread_is_counted(client: Client) -> None:
    client.put("/a", b"")
    threads = [threading.Thread(target=lambda: [client.stat("/a") for _ in range(2000)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert client.stats().operations["stat"].count == 8000


def test_an_awaited_client_tells_it_too(store: Path) -> None:
    async def work() -> ClientStats:
        async with emberfs.connect_async(f"ember://{store}") as client:
            await asyncio.gather(*(client.put(f"/{name}", b"x" * 10_000) for name in range(10)))
            await client.get("/1")
            return client.stats()

    operations = asyncio.run(work()).operations
    assert (operations["put"].count, operations["get"].count) == (10, 1)
