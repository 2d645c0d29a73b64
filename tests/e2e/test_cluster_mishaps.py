"""`emberline cluster` where something is wrong: each says what, leaves nothing behind unsaid, and how to go on.

Run: pytest tests/e2e/test_cluster_mishaps.py
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import emberfs
import pytest
from emberfs.cluster.credentials import directory_for
from emberfs.cluster.local import LocalCluster
from emberfs.cluster.processes import ServerProcess
from emberfs.server import read_config
from emberfs.transport.certificates import make_authority, make_token

from tests.e2e.test_cluster_cli import DATA, eventually, pids
from tests.fs.cli_run import emberline, emberline_json, start_emberline


@pytest.fixture
def small(tmp_path: Path) -> Iterator[LocalCluster]:
    """The way to a cluster of one node, which the test makes; stopped at the end."""
    cluster = LocalCluster(tmp_path / "small")
    yield cluster
    if cluster.exists:
        cluster.down()


def up(cluster: LocalCluster, *arguments: object, code: int = 0) -> str:
    return emberline("cluster", "up", "--dir", cluster.directory, *arguments, code=code).stderr


def make(cluster: LocalCluster) -> None:
    up(cluster, "--nodes", 1, "--targets", 1)


def running(cluster: LocalCluster) -> list[str]:
    return [name for name, pid in pids(cluster).items() if pid is not None]


def spoil(cluster: LocalCluster, name: str) -> Path:
    """That server does not start: its certificates are gone, to where is returned."""
    return (cluster.directory / name / "tls").rename(cluster.directory / name / "tls-away")


def test_a_first_up_that_fails_leaves_nothing_running(small: LocalCluster) -> None:
    first = start_emberline("cluster", "up", "--dir", small.directory, "--nodes", 1, "--targets", 1)
    assert first.stderr is not None
    for line in first.stderr:
        if b"storage-1" in line:
            break
    first.send_signal(signal.SIGINT)
    _, said = first.communicate(timeout=60)
    assert first.returncode == 130
    assert b"stopping kv-1" in said
    assert b"nothing that was started runs on" in said
    assert running(small) == []
    assert "remove" in up(small, "--targets", 2, code=2), "there is nothing in it yet"

    away = spoil(small, "storage-1")
    said_then = up(small, code=1)
    assert "Error: storage-1 ended at its start: " in said_then
    assert "tls" in said_then
    assert f"(its log: {small.server('storage-1').log})" in said_then
    assert running(small) == []
    away.rename(away.with_name("tls"))
    up(small)


def test_ctrl_c_between_a_fork_and_the_note_of_its_pid_loses_no_process(
    small: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    spawned: list[subprocess.Popen[bytes]] = []

    class Interrupted(subprocess.Popen[bytes]):
        def __init__(self, *arguments: Any, **settings: Any) -> None:
            super().__init__(*arguments, **settings)
            spawned.append(self)
            signal.raise_signal(signal.SIGINT)

    server = small.directory / "kv-1"
    server.mkdir(parents=True)
    (server / "config.toml").touch()
    process = ServerProcess(server)
    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        process.start()
    assert json.loads((server / "pid.json").read_bytes())["pid"] == spawned[0].pid
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    process.stop()
    assert spawned[0].wait(timeout=10) is not None


def test_an_up_that_fails_on_a_cluster_with_data_says_what_runs(small: LocalCluster) -> None:
    make(small)
    small.down()
    spoil(small, "meta-1")
    said = up(small, code=1)
    assert "started, and still running: kv-1, manager-1, storage-1\n" in said
    assert f"`emberline cluster down --dir {small.directory}` stops them" in said
    assert running(small) == ["kv-1", "manager-1", "storage-1"]


def test_without_its_kv_server_a_cluster_says_what_will_happen(small: LocalCluster) -> None:
    make(small)
    url = small.url
    small.server("kv-1").stop(by=signal.SIGKILL)
    said = ""

    def is_noticed() -> bool:
        nonlocal said
        result = emberline("cluster", "status", "--dir", small.directory, code=None)
        said = result.stdout
        return "DOES NOT RUN" in said and result.exit_code == 1

    eventually(is_noticed)  # The manager acts for a second on its last renewal.
    assert "kv-1       kv       " in said
    assert "without kv-1 no name is opened, listed or made" in said
    assert "`emberline cluster up` starts what does not run: kv-1" in said
    # From afar it is the manager that says it, to who has asked for a while.
    with start_emberline("cluster", "status", "--url", url) as afar:
        (facts,) = emberline_json("cluster", "status", "--dir", small.directory, code=1)
        assert {server["name"]: server["state"] == "DOES NOT RUN" for server in facts["servers"]} == {
            "kv-1": True,
            "manager-1": False,
            "storage-1": False,
            "meta-1": False,
        }
        for command in (["add-node"], ["drain", "storage-1"], ["remove-node", "storage-1"]):
            said = emberline("cluster", *command, "--dir", small.directory, code=1).stderr
            assert "no kv server runs: `emberline cluster up` starts what does not run" in said
        _, said_afar = afar.communicate(timeout=60)
        assert afar.returncode == 1 and b"key-value store for" in said_afar
    assert small.plan().nodes == ["storage-1"]
    up(small)
    assert "all is well" in emberline("cluster", "status", "--dir", small.directory).stdout


def test_a_node_is_not_added_to_a_cluster_that_does_not_run(small: LocalCluster) -> None:
    make(small)
    small.down()
    said = emberline("cluster", "add-node", "--dir", small.directory, code=1).stderr
    assert "the cluster does not run: `emberline cluster up` starts it" in said
    assert small.plan().nodes == ["storage-1"]
    assert not (small.directory / "storage-2").exists()


def test_a_node_that_does_not_start_is_not_added(small: LocalCluster) -> None:
    make(small)
    (small.directory / "storage-2").mkdir()
    config = (small.directory / "storage-1" / "config.toml").read_text()  # With the address of somebody who runs.
    (small.directory / "storage-2" / "config.toml").write_text(config)
    assert "storage-2 ended at its start" in emberline("cluster", "add-node", "--dir", small.directory, code=1).stderr
    assert small.plan().nodes == ["storage-1"]
    assert "all is well" in emberline("cluster", "status", "--dir", small.directory).stdout


def test_changed_options_are_not_silently_ignored(cluster: LocalCluster) -> None:
    up(cluster)
    up(cluster, "--nodes", 3, "--replicas", 3, "--targets", 2)
    said = up(cluster, "--nodes", 5, "--replicas", 2, "--targets", 4, "--kv", "postgresql://me:secret@db/x", code=2)
    assert "it has 3 storage nodes, not 5: `emberline cluster add-node`" in said
    assert "it keeps 3 replicas, not 2" in said
    assert "a disk of it holds 2 replicas, not 4" in said
    assert "its metadata is in a kv server of its own" in said
    assert "secret" not in said
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EMBERLINE_KV", "postgresql://db/x")
        up(cluster)


def test_a_copy_of_a_cluster_does_not_touch_the_original(cluster: LocalCluster, tmp_path: Path) -> None:
    before = pids(cluster)
    copy = tmp_path / "copy"
    copy.mkdir()
    shutil.copy(cluster.directory / "cluster.json", copy)
    shutil.copytree(cluster.directory / "manager-1", copy / "manager-1")
    for command in (["up"], ["down"], ["status"], ["add-node"]):
        said = emberline("cluster", *command, "--dir", copy, code=1).stderr
        assert f"this cluster was made as {cluster.directory}" in said
    assert pids(cluster) == before
    elsewhere = tmp_path / "link"
    elsewhere.symlink_to(cluster.directory)
    assert "all is well" in emberline("cluster", "status", "--dir", elsewhere).stdout


def test_a_damaged_description_is_named(tmp_path: Path) -> None:
    (tmp_path / "cluster.json").write_text('{"cluster": ')
    said = emberline("cluster", "status", "--dir", tmp_path, code=1).stderr
    assert f"Error: {tmp_path / 'cluster.json'} is damaged: " in said


def test_one_command_at_a_time(cluster: LocalCluster) -> None:
    import fcntl

    descriptor = os.open(cluster.directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        for command in (["up"], ["down"], ["add-node"], ["remove-node", "storage-1"]):
            said = emberline("cluster", *command, "--dir", cluster.directory, code=1).stderr
            assert "another `emberline cluster` command is at work" in said
    finally:
        os.close(descriptor)
    with emberfs.connect(cluster.url) as client:
        client.put("/works", DATA)


def test_servers_do_not_listen_where_connections_come_from(cluster: LocalCluster) -> None:
    """A port that any connection may be given is somebody's at the next `up`."""
    configs = [read_config(server.directory / "config.toml") for server in cluster.servers()]
    ports = [int(address.rpartition(":")[2]) for config in configs for address in (config.listen, config.metrics)]
    assert len(set(ports)) == len(ports)
    assert max(ports) < 32768


def test_join_renews_and_does_not_overwrite_others(
    cluster: LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    manager = cluster.address("manager-1")
    mine = directory_for(manager)

    def token(role: str, authority: Path = cluster.directory / "ca") -> str:
        return make_token(authority, role=role, valid_s=3600, now_s=time.time())

    def join(text: str, *arguments: object, code: int = 0) -> str:
        return emberline("cluster", "join", text, manager, *arguments, code=code).stderr

    join(token("client"))
    first = (mine / "cert.pem").read_bytes()
    join(token("client"))
    renewed = (mine / "cert.pem").read_bytes()
    assert renewed != first
    said = join(token("admin"), code=1)
    assert "there are credentials of the role client, not admin" in said
    assert "--into, or --force" in said
    assert str(mine) in said
    make_authority(tmp_path / "other", cluster="other", now_s=time.time())
    assert "of another cluster" in join(token("client", tmp_path / "other"), code=1)
    assert (mine / "cert.pem").read_bytes() == renewed
    join(token("admin"), "--force")
    assert "this token is for a storage server: give its directory by --into" in join(token("storage"), code=2)
    join(token("storage"), "--into", tmp_path / "tls")
    wrong = emberline("cluster", "join", token("storage"), cluster.address("storage-1"), "--into", tmp_path, code=1)
    assert "a manager that has `authority` gives one" in wrong.stderr
    (tmp_path / "tls" / "cert.pem").write_text("?")
    assert "that cannot be read" in join(token("storage"), "--into", tmp_path / "tls", code=1)


def test_servers_of_another_user_are_told_as_such(cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(pid: int, number: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    before = pids(cluster)
    monkeypatch.setattr(os, "kill", refuse)
    said = emberline("cluster", "down", "--dir", cluster.directory, code=1).stderr
    last = list(before)[-1]
    assert f"{last} is process {before[last]} of another user" in said
    assert pids(cluster) == before
