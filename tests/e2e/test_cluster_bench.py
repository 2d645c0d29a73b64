"""Where time goes in a cluster: bench, stats and profile on three storage nodes, and the metrics pages.

Run: pytest tests/e2e/test_cluster_bench.py
"""

from __future__ import annotations

import signal
import time
import urllib.request
from pathlib import Path

import emberfs
import pytest
from emberfs.cluster.local import LocalCluster
from emberfs.server import read_config

from ..fs.cli_run import emberline, emberline_json, start_emberline

QUICK = ("bench", "--quick", "--seconds", "0.02")


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory that the commands of a test are called in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_bench_names_limits_and_leaves_nothing_behind(url: str, workplace: Path) -> None:
    rows = emberline_json(*QUICK, "--threads", 2, url)
    assert len(rows) == 11
    assert all(row["store"] > 0 and 0 < row["limit_share"] <= 1 for row in rows)
    network = {row["name"]: sum(row["parts_s"].get(part, 0.0) for part in ("network", "latency")) for row in rows}
    assert min(network.values()) >= 0
    assert network["stat"] > 0 and network["read 4.0 KiB, anywhere"] > 0
    written = {row["name"]: row["parts_s"] for row in rows if row["name"].startswith("write")}
    assert all(parts["disk"] > 0 for parts in written.values())
    assert emberline("fs", "ls", store=url).stdout == ""
    assert list(workplace.iterdir()) == []


def test_an_interrupted_bench_leaves_nothing(url: str, workplace: Path) -> None:
    process = start_emberline("bench", "--seconds", 30, "--size", "2m", url)
    assert b"measuring" in process.stderr.readline()  # type: ignore[union-attr]
    with emberfs.connect(url) as client:
        while not client.list("/"):
            time.sleep(0.01)
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert emberline("fs", "ls", store=url).stdout == ""
    assert list(workplace.iterdir()) == []


def test_stats_show_every_role_and_every_server(url: str) -> None:
    with emberfs.connect(url) as client:
        process = start_emberline("stats", "--each", "--count", 1, "--interval", 2, "--json", url)
        while process.poll() is None:
            client.put("/a", b"x" * 100_000)
        output, _ = process.communicate()
        requests = client.stats().requests
    text = output.decode()
    assert all(f'"{name}"' in text for name in ("kv-1", "storage-1", "storage-2", "storage-3", "Forward", "KvCommit"))
    assert "CommitPut" in text and '"Once"' not in text
    assert {"WriteChunks", "CommitPut", "Reserve"} <= requests.keys()


def test_profile_splits_what_calls_took(url: str) -> None:
    rows = emberline_json("profile", "--seconds", 1, url)
    probes = {row["probe"]: row for row in rows if "probe" in row}
    for row in probes.values():
        parts = [row[f"{part}_s"] for part in ("client", "network", "queue", "disk", "work")]
        assert sum(parts) == pytest.approx(row["total_s"])
        assert min(parts) >= 0 and row["network_s"] > 0
    assert probes["put 1 MiB"]["disk_s"] > probes["stat"]["disk_s"]
    kinds = {(row["role"], row["request"]): row for row in rows if "request" in row}
    write = kinds["storage", "WriteChunks"]
    assert write["servers_s"] > 0 and write["disk_s"] > 0
    assert emberline("fs", "ls", store=url).stdout == ""


def test_the_pages_say_the_same(cluster: LocalCluster, url: str) -> None:
    with emberfs.connect(url) as client:
        client.put("/a", b"x" * 100_000)
    page = ""
    for server in cluster.servers():
        address = read_config(server.directory / "config.toml").metrics
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
            page += answer.read().decode()
    assert 'emberline_request_stage_seconds_bucket{le="' in page
    assert 'request="WriteChunks",stage="disk"' in page
    assert 'emberline_request_seconds_count{request="KvCommit"}' in page
