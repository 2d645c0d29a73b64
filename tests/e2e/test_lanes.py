"""Lanes on a real cluster: the same bytes as without, whoever writes, dies, stops or forks meanwhile.

Run: pytest tests/e2e/test_lanes.py
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import socket
import threading
import time
import urllib.request
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import emberfs
import pytest
from emberfs.checksum import crc32c
from emberfs.cluster.local import LocalCluster, Plan
from emberfs.errors import Corruption, NotFound
from emberfs.server import read_config
from emberfs.transport import TcpNetwork

from tests.fs.sharing_run import stopped
from tests.fs.stores import needs_native

pytestmark = needs_native

KIB, MIB = 1 << 10, 1 << 20
CHUNK_BYTES = 64 * KIB


@pytest.fixture(scope="module", params=["local", "streams"])
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """With TLS, and clients that share memory; without both, as in a network that is trusted."""
    cluster = LocalCluster(tmp_path_factory.mktemp("lanes") / "cluster")
    is_local = request.param == "local"
    nodes = ["storage-1", "storage-2"]
    cluster.up(Plan(cluster="lanes", replicas=2, targets_per_disk=2, nodes=nodes, tls=is_local))
    yield cluster
    cluster.down()


@pytest.fixture
def client(cluster: LocalCluster) -> Iterator[emberfs.Client]:
    with connect(cluster) as client:
        yield client


def connect(cluster: LocalCluster, *, url: str = "", **settings: Any) -> emberfs.Client:
    if cluster.plan().tls:
        settings["credentials"] = str(cluster.directory / "client")
    else:
        settings["shares_memory"] = False
    return emberfs.connect(url or cluster.url, **settings)


def lane_counts(cluster: LocalCluster) -> dict[str, float]:
    """The counters of all servers together."""
    counts: dict[str, float] = {}
    for name in ("storage-1", "storage-2"):
        address = read_config(cluster.directory / name / "config.toml").metrics
        for line in urllib.request.urlopen(f"http://{address}/metrics").read().decode().splitlines():
            if line.startswith("emberline_lane_"):
                key, value = line.split()
                counts[key] = counts.get(key, 0.0) + float(value)
    return counts


def warm(client: emberfs.Client, path: str) -> None:
    """Its servers have read all of it once."""
    client.get(path)


def test_lanes_serve_what_was_read_before(cluster: LocalCluster, client: emberfs.Client) -> None:
    data = random.Random(1).randbytes(MIB + 333)
    client.put("/warm", data, chunk_size_bytes=CHUNK_BYTES)
    warm(client, "/warm")
    with client.open("/warm", "rb") as file:
        before = lane_counts(cluster)
        assert file.read_at(100_000, 200_000) == data[100_000:300_000], "over chunks"
        assert file.read_at(MIB, 10_000) == data[MIB:], "cut at the end"
        file.seek(500_000)
        assert file.read(100_000) == data[500_000:600_000]
        after = lane_counts(cluster)
    assert after["emberline_lane_bytes"] - before["emberline_lane_bytes"] >= 300_000
    assert after["emberline_lane_damaged"] == 0
    stats = client.stats()
    assert stats.requests["lane"].payload_bytes >= 300_000
    assert 0 < stats.operations["file.read"].servers_s <= stats.operations["file.read"].total_s


def test_lanes_serve_the_first_read_of_what_was_written(cluster: LocalCluster, client: emberfs.Client) -> None:
    data = random.Random(2).randbytes(MIB + 333)
    client.put("/fresh", data, chunk_size_bytes=CHUNK_BYTES)
    before = lane_counts(cluster)["emberline_lane_bytes"]
    with client.open("/fresh", "rb") as file:
        assert file.read_at(0, MIB) == data[:MIB]
    assert lane_counts(cluster)["emberline_lane_bytes"] - before >= MIB


@pytest.mark.parametrize("where", ["buffer", "bytearray", "one buffer"])
def test_fast_and_slow_are_equal(cluster: LocalCluster, client: emberfs.Client, where: str) -> None:
    """Any ranges of several files, holes and ends and nothing too."""
    rng = random.Random(where)
    client.put("/a", rng.randbytes(700_001), chunk_size_bytes=CHUNK_BYTES)
    client.put("/b", rng.randbytes(300_000), chunk_size_bytes=4 * MIB)
    client.put("/small", b"in its inode")
    with client.open("/holes", "wb", chunk_size_bytes=CHUNK_BYTES) as holes:
        holes.write(b"begin")
        holes.seek(400_000)
        holes.write(b"end")
    paths = ["/a", "/b", "/small", "/holes"]
    for path in paths:
        warm(client, path)
    before = lane_counts(cluster)
    slow_url = "ember://" + ",".join(reversed(cluster.url.removeprefix("ember://").split(",")))  # A store of its own.
    with connect(cluster, url=slow_url, read_from="tail") as slow:
        files = [client.open(path, "rb") for path in paths]
        slow_files = [slow.open(path, "rb") for path in paths]
        for _ in range(60):
            picks = [(rng.randrange(4), rng.randrange(800_000), rng.choice([0, 1, 4096, 70_000])) for _ in range(20)]
            total = sum(length for _, _, length in picks)
            memory = client.buffer(total + 1) if where == "buffer" else memoryview(bytearray(total + 1))
            views, begin = [], 0
            for _, _, length in picks:
                views.append(memory[begin : begin + length])
                begin += length
            into: Any = memory if where == "one buffer" else views
            items, sums = [(files[at], offset, length) for at, offset, length in picks], array("I", bytes(80))
            counts = client.batch_read(items, into=into, sums=sums)
            slow_into = [bytearray(length) for _, _, length in picks]
            slow_counts = slow.batch_read(
                [(slow_files[at], offset, length) for at, offset, length in picks], into=slow_into
            )
            assert counts == slow_counts
            for view, other, count, crc in zip(views, slow_into, counts, sums, strict=True):
                assert view[:count] == other[:count]
                assert crc == crc32c(other[:count])
        for file in files + slow_files:
            file.close()
    assert lane_counts(cluster)["emberline_lane_bytes"] > before["emberline_lane_bytes"]


def test_a_server_that_ends_lanes_at_once_is_not_asked_for_one_each_time(
    cluster: LocalCluster, client: emberfs.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one of another release does."""
    opened, open_lane = [], TcpNetwork.open_lane

    async def open_bad_one(network: TcpNetwork, address: str) -> socket.socket | None:
        lane = await open_lane(network, address)
        opened.append(address)
        assert lane is not None
        lane.send(bytes(64))
        return lane

    data = random.Random(1).randbytes(MIB)
    client.put("/refused", data, chunk_size_bytes=CHUNK_BYTES)
    warm(client, "/refused")
    monkeypatch.setattr(TcpNetwork, "open_lane", open_bad_one)
    with client.open("/refused", "rb") as file:
        for at in range(0, MIB, 20_000):
            assert file.read_at(at, 20_000) == data[at : at + 20_000]
    assert 0 < len(opened) <= 4, "one to each server, as long as it does not take many seconds"


def test_bad_arguments_are_told_as_ever(client: emberfs.Client) -> None:
    client.put("/a", bytes(200_000), chunk_size_bytes=CHUNK_BYTES)
    with client.open("/a", "rb") as file:
        with pytest.raises(ValueError, match="too small"):
            client.batch_read([(file, 0, 100)], into=[bytearray(99)])
        with pytest.raises(ValueError, match="writable"):
            client.batch_read([(file, 0, 100)], into=[bytes(100)])
        with pytest.raises(ValueError, match="as many buffers"):
            client.batch_read([(file, 0, 100)], into=[])
        with pytest.raises(ValueError, match="bytes 0 to"):
            client.batch_read([(file, -1, 100)], into=[bytearray(100)])
        assert (
            client.batch_read([(file, 0, 100), ("/nothing", 0, 1)], into=bytearray(101), raise_errors=False)[0] == 100
        )
        with pytest.raises(NotFound):
            client.batch_read([("/nothing", 0, 1), (file, 0, 100)], into=bytearray(101))


def test_a_writer_is_seen_at_once(cluster: LocalCluster, client: emberfs.Client) -> None:
    """One process writes chunk after chunk, each of one number; what is read is whole, and never older than a read or
    an acknowledged write before."""
    chunks, times = 4, CHUNK_BYTES // 8
    client.put("/count", bytes(chunks * CHUNK_BYTES), chunk_size_bytes=CHUNK_BYTES)
    begun, written, stop = [0] * chunks, [0] * chunks, threading.Event()
    problems: list[str] = []

    def write() -> None:
        with connect(cluster) as writer, writer.open("/count", "r+b") as file:
            number = 0
            while not stop.is_set():
                number += 1
                at = number % chunks
                begun[at] = number
                writer.batch_write([(file, at * CHUNK_BYTES, number.to_bytes(8, "big") * times)])
                written[at] = number
                time.sleep(0.001)

    def read() -> None:
        rng, seen = random.Random(threading.get_ident()), [0] * chunks
        with client.open("/count", "rb") as file:
            into = memoryview(bytearray(CHUNK_BYTES))
            while not stop.is_set():
                at = rng.randrange(chunks)
                least = max(written[at], seen[at])
                assert client.batch_read([(file, at * CHUNK_BYTES, CHUNK_BYTES)], into=[into]) == [CHUNK_BYTES]
                most, found = begun[at], int.from_bytes(into[:8], "big")
                if into != bytes(into[:8]) * times:
                    problems.append("torn")
                if not least <= found <= most:
                    problems.append(f"chunk {at}: {found} read, {least} was there before, {most} begun after")
                seen[at] = max(seen[at], found)

    threads = [threading.Thread(target=work) for work in (write, read, read)]
    before = lane_counts(cluster)
    for thread in threads:
        thread.start()
    while min(written) < 200 and all(thread.is_alive() for thread in threads):
        time.sleep(0.01)
    stop.set()
    for thread in threads:
        thread.join()
    assert problems == []
    assert min(written) >= 200, "a thread has failed"
    assert lane_counts(cluster)["emberline_lane_bytes"] > before["emberline_lane_bytes"]


def test_damage_is_found_and_repaired_behind_a_lane(cluster: LocalCluster, client: emberfs.Client) -> None:
    data = random.Random(5).randbytes(CHUNK_BYTES)
    client.put("/flip", data, chunk_size_bytes=CHUNK_BYTES)
    warm(client, "/flip")
    damaged = 0
    for path in cluster.directory.glob("storage-1/data/target-*/blocks*"):
        content = path.read_bytes()
        if (at := content.find(data[:64])) >= 0:
            with open(path, "r+b") as file:
                file.seek(at + 1000)
                file.write(bytes([data[1000] ^ 1]))
            damaged += 1
    with client.open("/flip", "rb") as file:
        for _ in range(20):
            try:
                assert file.read_at(0, CHUNK_BYTES) == data
            except Corruption as error:  # pragma: no cover - the other replica has it
                raise AssertionError("the other replica was not asked") from error
    assert damaged <= 1


def test_many_threads_have_lanes_of_their_own(cluster: LocalCluster, client: emberfs.Client) -> None:
    data = random.Random(6).randbytes(2 * MIB)
    client.put("/threads", data, chunk_size_bytes=CHUNK_BYTES)
    warm(client, "/threads")
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        try:
            with client.open("/threads", "rb") as file:
                memory = client.buffer(100_000) if seed % 2 else memoryview(bytearray(100_000))
                for _ in range(100):
                    offset, length = rng.randrange(MIB), rng.randrange(100_000)
                    assert client.batch_read([(file, offset, length)], into=[memory[:length]]) == [length]
                    assert memory[:length] == data[offset : offset + length]
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert lane_counts(cluster)["emberline_lane_lanes"] <= 2 * 40


def _child(client: emberfs.Client, data: bytes, answer: Any) -> None:
    with client.open("/fork", "rb") as file:
        answer.put(all(file.read_at(at, 50_000) == data[at : at + 50_000] for at in range(0, MIB, 100_000)))


def test_a_forked_child_has_lanes_of_its_own(client: emberfs.Client) -> None:
    data = random.Random(7).randbytes(MIB + 50_000)
    client.put("/fork", data, chunk_size_bytes=CHUNK_BYTES)
    warm(client, "/fork")
    context = multiprocessing.get_context("fork")
    answer = context.Queue()
    with client.open("/fork", "rb") as file:
        assert file.read_at(0, 50_000) == data[:50_000]
        child = context.Process(target=_child, args=(client, data, answer))
        child.start()
        for at in range(0, MIB, 10_000):
            assert file.read_at(at, 50_000) == data[at : at + 50_000]
        assert answer.get(timeout=60) is True
        child.join(timeout=60)
        assert child.exitcode == 0


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_server_that_goes_away_under_a_read(
    cluster: LocalCluster, client: emberfs.Client, by: signal.Signals
) -> None:
    """Whoever it was that served, reads go on with the right bytes, and late ones of the server land nowhere."""
    data = random.Random(8).randbytes(2 * MIB)
    client.put("/away", data, chunk_size_bytes=CHUNK_BYTES)
    warm(client, "/away")
    memory = client.buffer(MIB)
    with client.open("/away", "rb") as file:
        for name in ("storage-1", "storage-2"):
            assert client.batch_read([(file, 0, MIB)], into=[memory]) == [MIB]
            pid = cluster.server(name).pid()
            assert pid is not None
            os.kill(pid, by)
            for at in range(0, MIB, 256 * KIB):
                assert client.batch_read([(file, at, MIB)], into=[memory]) == [MIB]
                assert memory == data[at : at + MIB]
            if by == signal.SIGSTOP:
                kept = bytes(memory)
                os.kill(pid, signal.SIGCONT)
                time.sleep(0.3)
                assert memory == kept
            cluster.up(Plan(cluster="lanes"))
            with cluster.admin() as admin:
                cluster.wait_serving(admin, lambda _: None)


def test_an_interrupt_ends_a_read_and_renews_its_memory(cluster: LocalCluster, client: emberfs.Client) -> None:
    data = random.Random(9).randbytes(MIB)
    client.put("/interrupt", data, chunk_size_bytes=CHUNK_BYTES)
    warm(client, "/interrupt")
    memory = client.buffer(MIB)
    with client.open("/interrupt", "rb") as file:
        assert client.batch_read([(file, 0, MIB)], into=[memory]) == [MIB]
        with contextlib.ExitStack() as servers:
            for name in ("storage-1", "storage-2"):
                pid = cluster.server(name).pid()
                assert pid is not None
                servers.enter_context(stopped(pid))
            timer = threading.Timer(0.3, signal.raise_signal, [signal.SIGINT])
            with pytest.raises(KeyboardInterrupt):
                timer.start()
                client.batch_read([(file, 0, MIB)], into=[memory])
        assert client.batch_read([(file, 0, MIB)], into=[memory]) == [MIB]
        assert memory == data


def test_lanes_are_closed_with_their_client(cluster: LocalCluster, tmp_path: Path) -> None:
    with connect(cluster) as client:
        client.put("/close", bytes(MIB), chunk_size_bytes=CHUNK_BYTES)
        warm(client, "/close")
        before = lane_counts(cluster)["emberline_lane_lanes"]
        with client.open("/close", "rb") as file:
            file.read_at(0, MIB)
        assert lane_counts(cluster)["emberline_lane_lanes"] > before
    deadline_s = time.monotonic() + 60
    while lane_counts(cluster)["emberline_lane_lanes"] > before:
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
