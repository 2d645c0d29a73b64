"""Upkeep of a real cluster from the command line: who may, what is found, what is mended."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from emberfs import Client
from emberfs.cluster.local import LocalCluster

from tests.fs.cli_run import emberline, emberline_json


def content(mark: str) -> bytes:
    """Of a file with chunks; `mark` finds it on the disks."""
    return bytes(range(256)) * 1000 + mark.encode() + bytes(1000)


@pytest.fixture
def operator(cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whoever has the cluster's directory is its admin."""
    monkeypatch.setenv("EMBERLINE_CLUSTER", str(cluster.directory))
    yield


def damage(cluster: LocalCluster, mark: str, *, nodes: str) -> None:
    """Change a byte of every copy of a file on the disks of storage nodes, by their numbers."""
    for number in nodes:
        files = list((cluster.directory / f"storage-{number}" / "data").glob("target-*/blocks-*"))
        assert sum(flip(file, mark.encode()) for file in files) == 1, number


def flip(file: Path, mark: bytes) -> bool:
    offset = file.read_bytes().find(mark)
    if offset < 0:
        return False
    with open(file, "r+b") as block:
        block.seek(offset)
        block.write(b"?")
    return True


@pytest.mark.usefixtures("operator")
def test_scrub_mends_what_one_replica_lost(cluster: LocalCluster, client: Client, url: str) -> None:
    client.put("/precious", content("mended"))
    damage(cluster, "mended", nodes="2")
    result = emberline("fs", "scrub", url)
    assert "repaired  /precious  storage-2, chain" in result.stdout
    assert "1 finding, 1 repaired" in result.stdout
    assert "storage-2: " in result.stderr
    client.collect_garbage(force=True)
    *nodes, summary = emberline_json("fs", "scrub", url, "--rate", 100)
    assert summary == {"clean": True, "chunks": 3, "read_bytes": 3 * len(content("mended")), "findings": 0}
    assert [(node["node"], node["damaged"]) for node in nodes] == [(f"storage-{n}", 0) for n in "123"]
    assert client.get("/precious") == content("mended")
    assert "all is well" in emberline("cluster", "status").stdout


@pytest.mark.usefixtures("operator")
def test_scrub_names_what_is_lost(cluster: LocalCluster, client: Client, url: str) -> None:
    client.put("/precious", content("lost"))
    damage(cluster, "lost", nodes="123")
    *rest, summary = emberline_json("fs", "scrub", url, code=1)
    findings = [each for each in rest if "kind" in each]
    assert [(each["path"], each["repaired"]) for each in findings] == [("/precious", False)] * 3
    assert not summary["clean"]
    client.put("/precious", content("new"))  # What was there waits for the garbage collection.
    client.collect_garbage(force=True)
    emberline("fs", "scrub", url)


def test_scrub_takes_an_admin(url: str) -> None:
    result = emberline("fs", "scrub", url, code=1)
    assert "may not send ScrubChunks: it takes a certificate of role admin" in result.stderr
