"""`emberline stats` and `emberline profile`: what servers serve, and where the time of calls goes.

Run: pytest tests/fs/test_attribution.py
"""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import emberfs
import pytest
from emberfs import Client
from emberfs.cli.attribution import attribute, span
from emberfs.cli.scratch import scratch_directory
from emberfs.cli.servers import Look, between, by_role
from emberfs.histogram import Histogram
from emberfs.meter import KindStats
from hypothesis import given
from hypothesis import strategies as st

from .cli_run import emberline, emberline_json, start_emberline
from .sharing_run import no_server_left

SECONDS = st.floats(0, 100)


def kind(count: int, *, queue: float = 0.0, disk: float = 0.0, servers: float = 0.0, work: float = 0.0) -> KindStats:
    def histogram(total_s: float) -> Histogram:
        return Histogram({1: count}, total_s, total_s)

    whole = histogram(queue + disk + servers + work)
    return KindStats(whole, histogram(queue), histogram(disk), histogram(servers), histogram(work))


# ---- attribution


@given(SECONDS, SECONDS, SECONDS, st.lists(SECONDS, min_size=7, max_size=7), st.integers(0, 20))
def test_the_parts_add_up_whatever_the_servers_say(
    client_s: float, servers_s: float, disk_s: float, stages: list[float], sent: int
) -> None:
    write = kind(10, queue=stages[0], disk=stages[1], servers=stages[2], work=stages[3])
    forward = kind(10, queue=stages[4], disk=stages[5], work=stages[6])
    shares = attribute(
        total_s=client_s + servers_s + disk_s,
        servers_s=servers_s,
        disk_s=disk_s,
        sent={"WriteChunks": (sent, servers_s)} if sent else {},
        looks=[Look("a", "storage", 1.0, {"WriteChunks": write}), Look("b", "storage", 1.0, {"Forward": forward})],
    )
    assert shares.total == pytest.approx(client_s + servers_s + disk_s, abs=1e-6)
    parts = (shares.client, shares.network, shares.queue, shares.disk, shares.work)
    assert all(part >= -1e-6 for part in parts)
    assert sum(shares.fractions().values()) == pytest.approx(1 if shares.total else 0, abs=1e-6)


def test_a_chain_is_followed_to_the_disk_behind_it() -> None:
    head = kind(10, queue=1.0, disk=2.0, servers=5.0, work=1.0)
    shares = attribute(
        total_s=12.0,
        servers_s=11.0,
        disk_s=0.0,
        sent={"WriteChunks": (10, 11.0)},
        looks=[Look("a", "storage", 1.0, {"WriteChunks": head, "Forward": kind(10, disk=3.0, work=1.0)})],
    )
    assert shares.client == pytest.approx(1.0)
    assert shares.network == pytest.approx(3.0)  # 2 from here to the head, 1 from there on.
    assert (shares.queue, shares.disk, shares.work) == pytest.approx((1.0, 5.0, 2.0))


def test_others_requests_are_not_ours() -> None:
    looks = [Look("a", "storage", 1.0, {"ReadChunks": kind(100, disk=50.0)})]
    shares = attribute(total_s=10.0, servers_s=10.0, disk_s=0.0, sent={"ReadChunks": (10, 10.0)}, looks=looks)
    assert (shares.disk, shares.network) == pytest.approx((5.0, 5.0))


def test_requests_side_by_side_are_not_taken_for_a_busy_server() -> None:
    looks = [Look("a", "storage", 1.0, {"ReadChunks": kind(20, disk=10.0)})]
    shares = attribute(total_s=10.0, servers_s=10.0, disk_s=0.0, sent={"ReadChunks": (20, 20.0)}, looks=looks)
    assert (shares.disk, shares.network) == pytest.approx((5.0, 5.0))


def test_a_span_holds_what_was_called_in_it(client: Client) -> None:
    client.put("/a", b"x" * 100_000)
    with span(client) as found:
        for _ in range(3):
            client.put("/b", b"y" * 100_000)
    client.stat("/a")
    assert found.calls == 3
    assert found.shares.disk > found.shares.client > 0
    assert (found.shares.network, found.shares.queue) == (0, 0)


# ---- looks


def test_a_server_that_began_anew_is_counted_from_there() -> None:
    earlier = [Look("a", "meta", 10.0, {"Stat": kind(5, work=5.0)}), Look("b", "meta", 10.0)]
    later = [Look("a", "meta", 2.0, {"Stat": kind(3, work=1.0)}), Look("b", "meta", trouble="does not answer")]
    found = between(earlier, later)
    assert (found[0].up_s, found[0].kinds["Stat"].whole.count) == (2.0, 3)
    assert found[1].trouble == "does not answer"
    summed = by_role(found)
    assert [(each.server, each.trouble) for each in summed] == [("b", "does not answer"), ("1 meta", "")]


def test_servers_of_a_role_are_summed_up() -> None:
    looks = [Look(name, "storage", 2.0, {"ReadChunks": kind(4, disk=1.0)}) for name in ("a", "b")]
    (both,) = by_role(looks)
    assert (both.server, both.up_s, both.kinds["ReadChunks"].whole.count) == ("2 storage", 2.0, 8)


# ---- the commands


def test_stats_of_a_store_that_nobody_else_has(client: Client) -> None:
    done = emberline("stats", "--count", 1, "--interval", 0.05, client.url)
    assert "no other process has this store open" in done.stderr


def test_stats_and_profile_of_a_shared_store(store: Path) -> None:
    with no_server_left(store), emberfs.connect(f"ember://{store}") as client:
        client.put("/a", b"x" * 100_000)
        process = start_emberline("stats", "--interval", 0.1, "--count", 20, "--json", f"ember://{store}")
        try:
            while process.poll() is None:
                client.stat("/a")
                client.put("/b", b"y" * 10_000)
                time.sleep(0.001)
            rows = [json.loads(line) for line in process.stdout.read().splitlines()]  # type: ignore[union-attr]
        finally:
            process.kill()
            process.communicate()
        kinds = {row["request"] for row in rows if row["role"] == "store"}
        assert {"Stat", "CommitPut", "WriteChunks"} <= kinds
        assert all(row["p50_s"] <= row["p99_s"] <= row["max_s"] for row in rows)
        assert max(row["bytes_per_s"] for row in rows if row["request"] == "WriteChunks") > 0
        stats = client.stats()
        assert stats.requests["WriteChunks"].payload_bytes > 10_000
        assert 0 < stats.operations["put"].servers_s < stats.operations["put"].total_s
        _check_profile(emberline_json("profile", "--seconds", 0.5, client.url), has_servers=True)
        assert {name for name, _ in client.list("/")} == {"a", "b"}


def test_profile_of_a_store_that_nobody_else_has(store: Path) -> None:
    emberline("fs", "mkdir", f"ember://{store}/!/x")
    _check_profile(emberline_json("profile", "--seconds", 0.5, f"ember://{store}"), has_servers=False)
    assert emberline("fs", "ls", f"ember://{store}/!/").stdout == "x/\n"
    text = emberline("profile", "--seconds", 0.5, f"ember://{store}").stdout
    assert "read 1 MiB" in text and "%" in text


def _check_profile(rows: list[dict[str, float | str]], *, has_servers: bool) -> None:
    probes = [row for row in rows if "probe" in row]
    requests = [row for row in rows if "request" in row]
    assert len(probes) == 5
    assert bool(requests) == has_servers
    for row in probes:
        parts = [row[f"{part}_s"] for part in ("client", "network", "queue", "disk", "work")]
        assert sum(parts) == pytest.approx(row["total_s"])  # type: ignore[arg-type]
    for row in requests:
        parts = [row[f"{part}_s"] for part in ("queue", "disk", "servers", "work")]
        assert sum(parts) == pytest.approx(row["total_s"], abs=1e-6)  # type: ignore[arg-type]


def test_an_interrupted_probe_leaves_nothing(store: Path) -> None:
    emberline("fs", "mkdir", f"ember://{store}/!/x")
    process = start_emberline("profile", "--seconds", 60, f"ember://{store}")
    assert b"looking at" in process.stderr.readline()  # type: ignore[union-attr]
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert emberline("fs", "ls", f"ember://{store}/!/").stdout == "x/\n"


def test_a_scratch_directory_goes_with_its_error(client: Client) -> None:
    with pytest.raises(ZeroDivisionError), scratch_directory(client, "test") as path:
        client.put(f"{path}/a", b"x" * 10_000)
        raise ZeroDivisionError
    assert client.list("/") == []
    assert signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
