"""`emberline cluster`: what an operator types on one host, with real servers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import emberfs
import pytest
from emberfs.cluster.local import LocalCluster
from emberfs.errors import DataLost

from tests.fs.cli_run import emberline, emberline_json, start_emberline

DEADLINE_S = 60.0
DATA = bytes(range(256)) * 1000


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """Of the test's own cluster, stopped at the end."""
    directory = tmp_path / "cluster"
    yield directory
    cluster = LocalCluster(directory)
    if cluster.exists:
        cluster.down()


def up(directory: Path, *arguments: object) -> LocalCluster:
    emberline("cluster", "up", "--dir", directory, "--targets", 1, *arguments)
    return LocalCluster(directory)


def pids(cluster: LocalCluster) -> dict[str, int | None]:
    return {server.name: server.pid() for server in cluster.servers()}


def eventually(look: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while not look():
        assert time.monotonic() < deadline_s
        time.sleep(0.1)


def test_up_is_done_once_and_down_takes_only_its_own(directory: Path, cluster: LocalCluster) -> None:
    others = pids(cluster)
    mine = up(directory, "--nodes", 1)
    running = pids(mine)
    assert list(running) == ["kv-1", "manager-1", "storage-1", "meta-1"]
    (again,) = emberline_json("cluster", "up", "--dir", directory)
    assert again == {"url": mine.url, "directory": str(directory)}
    assert pids(mine) == running
    with emberfs.connect(mine.url) as client:
        client.put("/kept", DATA)
    # A pid file that outlived its process, and whose number is somebody else's now.
    bystander = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    try:
        stale = mine.server("meta-1")
        stale.stop()
        (stale.directory / "pid.json").write_text(json.dumps({"pid": bystander.pid, "started": 1}))
        (stopped,) = emberline_json("cluster", "down", "--dir", directory)
        assert stopped == {"stopped": 3}
        assert bystander.poll() is None
    finally:
        bystander.communicate(b"")
    assert set(pids(mine).values()) == {None}
    assert pids(cluster) == others
    assert "does not run" in emberline("cluster", "status", "--dir", directory, code=1).stderr
    with emberfs.connect(up(directory).url) as client:
        assert client.get("/kept") == DATA


def test_an_interrupted_up_goes_on(directory: Path) -> None:
    first = start_emberline("cluster", "up", "--dir", directory, "--nodes", 2, "--targets", 1)
    assert first.stderr is not None
    for line in first.stderr:
        if b"storage-1" in line:
            break
    first.kill()
    first.communicate()
    cluster = LocalCluster(directory)
    assert None in pids(cluster).values()
    cluster = up(directory)
    assert None not in pids(cluster).values()
    with emberfs.connect(cluster.url) as client:
        client.put("/works", DATA)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["up", "--dir", "{strange}"], 1, "diary.txt"),
        (["up", "--dir", "{new}", "--nodes", "2", "--replicas", "3"], 1, "3 replicas need as many nodes"),
        (["up", "--dir", "{new}", "--nodes", "0"], 2, "--nodes"),
        (["up"], 2, "--dir"),
        (["status", "--dir", "{new}"], 1, "no cluster here"),
        (["status", "--url", "ember:///dir"], 2, "not the URL of a cluster"),
        (["down", "--dir", "{new}"], 1, "no cluster here"),
        (["token", "--dir", "{new}"], 1, "no cluster here"),
        (["token", "--dir", "{new}", "--hours", "-1"], 2, "--hours"),
        (["add-node", "--dir", "{new}"], 1, "no cluster here"),
        (["remove-node", "x", "--dir", "{new}"], 1, "no cluster here"),
        (["join", "nonsense", "127.0.0.1:1"], 1, "not a join token"),
    ],
)
def test_a_mistake_is_one_clear_sentence(tmp_path: Path, arguments: list[str], code: int, says: str) -> None:
    strange, new = tmp_path / "strange", tmp_path / "new"
    strange.mkdir()
    (strange / "diary.txt").write_text("dear")
    words = [word.format(strange=strange, new=new) for word in arguments]
    result = emberline("cluster", *words, code=code)
    assert says in result.stderr
    assert "Traceback" not in result.stderr
    assert not new.exists()


def test_status_says_what_is_wrong(directory: Path) -> None:
    cluster = up(directory, "--nodes", 2)
    result = emberline("cluster", "status", "--dir", directory)
    assert "all is well" in result.stdout
    (facts,) = emberline_json("cluster", "status", "--url", cluster.url)
    assert facts["problems"] == []
    assert {server["state"] for server in facts["servers"]} == {"alive"}
    victim = cluster.server("storage-2")
    victim.stop(by=signal.SIGKILL)
    eventually(lambda: "chain 1:" in emberline("cluster", "status", "--dir", directory, code=None).stdout)
    result = emberline("cluster", "status", "--dir", directory, code=1)
    assert "storage-2 is down" in result.stdout
    assert "brought up to date when it is back" in result.stdout
    (facts,) = emberline_json("cluster", "status", "--dir", directory, code=1)
    assert facts["chains_serving"] == 0
    assert any(problem.startswith("chain 1:") for problem in facts["problems"])
    with emberfs.connect(cluster.url) as client:
        client.put("/while-it-is-down", DATA)
    up(directory)
    assert "all is well" in emberline("cluster", "status", "--dir", directory).stdout


def test_logs(cluster: LocalCluster) -> None:
    at = ("--dir", cluster.directory)
    assert "serves at" in emberline("cluster", "logs", "storage-1", *at).stdout
    first = emberline_json("cluster", "logs", "storage-1", *at)[0]
    assert (first["server"], first["level"]) == ("storage-1", "info")
    assert "storage-1" in emberline("cluster", "logs", "nobody", *at, code=1).stderr


def test_chains_move_to_a_new_node_and_off_an_old_one(directory: Path) -> None:
    cluster = up(directory, "--nodes", 2)
    with emberfs.connect(cluster.url) as client:
        client.put("/data", DATA)
        assert emberline_json("cluster", "add-node", "--dir", directory) == [{"added": "storage-3"}]
        assert "drain it first" in emberline("cluster", "remove-node", "storage-1", "--dir", directory, code=1).stderr
        assert emberline_json("cluster", "drain", "storage-1", "--dir", directory) == [{"node": "storage-1", "left": 0}]
        emberline("cluster", "remove-node", "storage-1", "--dir", directory)
        assert list(pids(cluster)) == ["kv-1", "manager-1", "manager-2", "storage-2", "storage-3", "meta-1", "meta-2"]
        with cluster.admin() as admin:
            cluster.wait_serving(admin, lambda _: None)
            assert {target.node for target in admin.routing().targets} == {"storage-2", "storage-3"}
        assert client.get("/data") == DATA
        client.put("/data", DATA[::-1])
    assert "all is well" in emberline("cluster", "status", "--dir", directory).stdout


def test_a_lost_node_is_replaced(directory: Path) -> None:
    """As docs/operations.md has it, by the URL of the managers for what is asked of them."""
    cluster = up(directory, "--nodes", 2)
    far = ("--url", cluster.url)
    with pytest.MonkeyPatch.context() as patch, emberfs.connect(cluster.url) as client:
        patch.setenv("EMBERLINE_CREDENTIALS", str(directory / "admin"))
        client.put("/data", DATA)
        cluster.server("storage-1").stop(by=signal.SIGKILL)
        shutil.rmtree(cluster.server("storage-1").directory / "data")
        emberline("cluster", "add-node", "--dir", directory)
        assert "say which node" in emberline("cluster", "add-node", *far, code=2).stderr
        assert "no storage node nobody" in emberline("cluster", "add-node", "nobody", *far, code=1).stderr
        assert emberline_json("cluster", "add-node", "storage-3", *far) == [{"added": "storage-3"}]
        assert "drain it first" in emberline("cluster", "remove-node", "storage-1", *far, code=1).stderr
        drained = emberline("cluster", "drain", "storage-1", *far).stderr
        assert "`emberline cluster remove-node storage-1` takes it out" in drained
        assert emberline_json("cluster", "remove-node", "storage-1", *far) == [{"removed": "storage-1"}]
        eventually(lambda: "all is well" in emberline("cluster", "status", *far, code=None).stdout)
        assert client.get("/data") == DATA


def test_a_loss_is_said_and_accepted(directory: Path) -> None:
    cluster = up(directory, "--nodes", 1)
    with emberfs.connect(cluster.url) as client:
        client.put("/gone", DATA)
        client.put("/small", b"lies with its name")
        server = cluster.server("storage-1")
        server.stop()
        shutil.rmtree(server.directory / "data")
        server.start()
        eventually(lambda: "accept-loss" in emberline("cluster", "status", "--dir", directory, code=None).stdout)
        with pytest.raises(DataLost, match="accept-loss"):
            client.get("/gone")
        assert client.get("/small") == b"lies with its name"
        (facts,) = emberline_json("cluster", "status", "--dir", directory, code=1)
        (chain,) = facts["chains"]
        (target,) = chain["targets"]
        arguments = ("cluster", "accept-loss", chain["chain"], "--target", target[:6], "--dir", directory)
        emberline(*arguments, stdin=b"n\n", code=1)
        emberline(*arguments, "--yes")
        up(directory)
        client.put("/new", DATA)
        assert client.get("/new") == DATA


def test_a_machine_with_a_token_joins(cluster: LocalCluster, url: str, tmp_path: Path) -> None:
    token = emberline("cluster", "token", "--dir", cluster.directory).stdout.strip()
    manager = url.removeprefix("ember://").split(",")[0]
    emberline("cluster", "join", token, manager, "--into", tmp_path / "mine")
    assert (tmp_path / "mine" / "key.pem").stat().st_mode & 0o077 == 0
    source = f"import emberfs; emberfs.connect({url!r}, credentials={str(tmp_path / 'mine')!r}).put('/joined', b'yes')"
    environment = {**os.environ, "XDG_CONFIG_HOME": str(tmp_path / "nothing here")}
    subprocess.run([sys.executable, "-c", source], env=environment, check=True, timeout=DEADLINE_S)
    with emberfs.connect(url) as client:
        assert client.get("/joined") == b"yes"
    late = emberline("cluster", "token", "--dir", cluster.directory, "--hours", 0).stdout.strip()
    assert "expired" in emberline("cluster", "join", late, manager, "--into", tmp_path / "late", code=1).stderr
    changed = ("A" if token[-5] != "A" else "B").join([token[:-5], token[-4:]])
    assert emberline("cluster", "join", changed, manager, "--into", tmp_path / "forged", code=1).stderr
    assert not (tmp_path / "forged").exists()


def test_the_configuration_is_changed_while_the_cluster_runs(directory: Path) -> None:
    cluster = up(directory, "--nodes", 1)
    at = ("--dir", directory)
    (before,) = emberline_json("cluster", "config", "get", "--url", cluster.url)
    assert before["chosen"] == [] and before["values"]["migration_bytes_per_s"] == 50 << 20
    changes = ("migration_bytes_per_s=20MiB", "trash_s=3d", "dead_after_s=4")
    (after,) = emberline_json("cluster", "config", "set", *changes, *at)
    assert after["version"] == before["version"] + 1
    assert after["values"] == {"migration_bytes_per_s": 20 << 20, "trash_s": 3 * 86400.0, "dead_after_s": 4.0}
    assert emberline("cluster", "config", "get", "trash_s", *at).stdout == "259200.0\n"
    text = emberline("cluster", "config", "get", *at).stdout
    assert f"version {after['version']}" in text and "a node counts as dead" in text
    for words, code, says in [
        (("set", "moves_max=2", "--version", before["version"]), 1, "by now"),
        (("set", "moves_max=lots"), 2, "not a change"),
        (("set", "trash_s=3MiB"), 2, "not a change"),
        (("set", "moves_max=0"), 1, "moves_max is 1 to"),
        (("set", "moves=2"), 1, "did you mean moves_max"),
        (("get", "moves"), 1, "did you mean moves_max"),
    ]:
        assert says in emberline("cluster", "config", *words, *at, code=code).stderr
    emberline("cluster", "config", "unset", "trash_s", "migration_bytes_per_s", "dead_after_s", *at)
    (unset,) = emberline_json("cluster", "config", "get", *at)
    assert unset["chosen"] == []
    with emberfs.connect(cluster.url) as client:
        client.put("/works", DATA)
