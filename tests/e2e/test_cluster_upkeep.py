"""Upkeep of a real cluster from the command line: who may, what is found, what is mended."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import emberfs
import pytest
from emberfs import Client
from emberfs.cluster import ClusterStore
from emberfs.cluster.local import LocalCluster
from emberfs.messages import RemoveChunks, WriteChunks
from emberfs.types import chunk_id

from tests.fs.cli_run import emberline, emberline_json

DEADLINE_S = 60.0
UNMENDED = "that no other replica could mend"


def content(mark: str) -> bytes:
    """Of a file with chunks; `mark` finds it on the disks."""
    return bytes(range(256)) * 1000 + mark.encode() + bytes(1000)


def eventually(look: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while not look():
        assert time.monotonic() < deadline_s
        time.sleep(0.1)


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
    """Wherever it is: a write that came again has left another copy, in a block that is free by now."""
    places = [found.start() for found in re.finditer(re.escape(mark), file.read_bytes())]
    with open(file, "r+b") as block:
        for place in places:
            block.seek(place)
            block.write(b"?")
    return bool(places)


@pytest.mark.usefixtures("operator")
def test_scrub_mends_what_one_replica_lost(cluster: LocalCluster, client: Client, url: str) -> None:
    client.put("/precious", content("mended"))
    damage(cluster, "mended", nodes="2")
    result = emberline("fs", "scrub", url)
    assert "repaired  /precious  storage-2, chain" in result.stdout
    assert "1 finding, 1 repaired" in result.stdout
    assert "storage-2: " in result.stderr
    *nodes, summary = emberline_json("fs", "scrub", url, "--rate", 100)
    assert (summary["clean"], summary["findings"]) == (True, 0)
    assert summary["read_bytes"] >= 3 * len(content("mended"))
    assert sum(node["chunks"] for node in nodes) == summary["chunks"] >= 3
    assert [(node["node"], node["damaged"]) for node in nodes] == [(f"storage-{n}", 0) for n in "123"]
    assert client.get("/precious") == content("mended")
    assert UNMENDED not in emberline("cluster", "status", code=None).stdout


@pytest.mark.usefixtures("operator")
def test_scrub_names_what_is_lost(cluster: LocalCluster, client: Client, url: str) -> None:
    client.put("/precious", content("lost"))
    damage(cluster, "lost", nodes="123")
    *rest, summary = emberline_json("fs", "scrub", url, code=1)
    findings = [each for each in rest if "kind" in each]
    assert [(each["path"], each["repaired"]) for each in findings] == [("/precious", False)] * 3
    assert not summary["clean"]
    client.put("/precious", content("new"))  # What was there waits for the garbage collection.
    eventually(lambda: UNMENDED in emberline("cluster", "status", code=None).stdout)
    client.collect_garbage(force=True)
    emberline("fs", "scrub", url)
    eventually(lambda: UNMENDED not in emberline("cluster", "status", code=None).stdout)


def test_scrub_takes_an_admin(url: str) -> None:
    result = emberline("fs", "scrub", url, code=1)
    assert "may not send ScrubChunks: it takes a certificate of role admin" in result.stderr


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalCluster]:
    """A cluster of the test's own, stopped at the end."""
    cluster = LocalCluster(tmp_path / "own")
    monkeypatch.setenv("EMBERLINE_CLUSTER", str(cluster.directory))
    try:
        emberline("cluster", "up", "--nodes", 3, "--targets", 2)
        yield cluster
    finally:
        if cluster.exists:
            cluster.down()


def test_a_cluster_whose_kv_is_lost_comes_back_from_a_dump(own: LocalCluster, tmp_path: Path) -> None:
    backup, kv = tmp_path / "backup.jsonl", own.directory / "kv-1" / "data"
    with emberfs.connect(own.url) as client:
        client.mkdir("/books")
        for number in range(5):
            client.put(f"/books/{number}", content(f"before {number}"))
        client.put("/small", b"lies with its name")
        with client.open("/log", "ab") as log:
            log.write(content("a log that is being written"))
            log.flush()
            (made,) = emberline_json("fs", "dump", backup, own.url)
        assert made["lines"] == len(backup.read_text().splitlines())
        client.put("/later", content("after the dump"))
    assert "stop the kv server first" in emberline("fs", "load", backup, "--kv", kv, code=1).stderr
    emberline("cluster", "down")
    assert "rows already" in emberline("fs", "load", backup, "--kv", kv, code=1).stderr
    shutil.rmtree(kv)
    emberline("fs", "load", backup, "--kv", kv)
    emberline("cluster", "up")
    with emberfs.connect(own.url) as client:
        assert [name for name, _ in client.list("/")] == ["books", "log", "small"]
        assert [client.get(f"/books/{number}") for number in range(5)] == [content(f"before {n}") for n in range(5)]
        assert client.get("/small") == b"lies with its name"
        assert client.get("/log") == content("a log that is being written")
        client.put("/new", content("new"))
        with client.open("/log", "ab") as log:
            log.write(b"goes on")
        assert client.get("/log") == content("a log that is being written") + b"goes on"
    # The chains serve by what was dumped, before the managers have heard of the nodes.
    eventually(lambda: "all is well" in emberline("cluster", "status", code=None).stdout)


def test_what_a_dump_is_not_for(
    url: str, tmp_path: Path, cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = emberline("fs", "dump", tmp_path / "mine.jsonl", url, code=1)
    assert "may not send ReadRows: it takes a certificate of role admin" in result.stderr
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("EMBERLINE_CREDENTIALS", str(cluster.directory / "admin"))
    emberline("fs", "dump", tmp_path / "backup.jsonl", url)
    header = json.loads((tmp_path / "backup.jsonl").read_text().splitlines()[0])
    assert len(header["cluster"]["chains"]) == 2
    result = emberline("fs", "load", tmp_path / "backup.jsonl", url, code=2)
    assert "with chains of its own" in result.stderr
    store = f"ember://{tmp_path}/store"
    emberline("fs", "mkdir", "/a", store=store)
    shutil.rmtree(tmp_path / "store" / "meta")
    assert "a dump of a cluster" in emberline("fs", "load", tmp_path / "backup.jsonl", store, code=1).stderr


@pytest.mark.usefixtures("operator")
def test_fsck_of_a_cluster(client: Client, url: str) -> None:
    client.put("/file", content("checked"))
    assert emberline("fs", "fsck", url).stdout == "clean\n"
    with client.open("/log", "ab") as log:
        log.write(content("being written"))
        assert emberline_json("fs", "fsck", url) == [{"clean": True, "findings": 0, "repaired": 0}]
    stray(client)
    finding, summary = emberline_json("fs", "fsck", url, code=1)
    assert (finding["kind"], finding["repaired"]) == ("chunks", False)
    assert finding["detail"] == "there are chunks of inode c, which does not exist"
    assert summary == {"clean": False, "findings": 1, "repaired": 0}
    result = emberline("fs", "fsck", url, code=1)
    assert "looking again, whether 1 findings stay" in result.stderr
    assert "--repair" not in result.stderr
    stray(client, remove=True)


def stray(client: Client, *, remove: bool = False) -> None:
    """A chunk of no file."""
    store = client._attachment.store
    assert isinstance(store, ClusterStore)
    chunk = chunk_id(12, 0)
    request = RemoveChunks([1], [chunk]) if remove else WriteChunks(b"", 0, 0, [1], [chunk], [0], 1 << 20)
    store.portal.run(store.storage.call(request, [] if remove else [memoryview(b"stray")]))


def test_fsck_takes_an_admin(url: str) -> None:
    result = emberline("fs", "fsck", url, code=1)
    assert "may not send ReadRows: it takes a certificate of role admin" in result.stderr
