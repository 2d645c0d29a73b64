"""Who is not let in: plaintext, another cluster's certificate, and a certificate of another role."""

from __future__ import annotations

import time
from pathlib import Path

import emberfs
import pytest
from emberfs.cluster.admin import Admin
from emberfs.cluster.joining import join_cluster
from emberfs.cluster.local import LocalCluster
from emberfs.errors import AccessDenied, NotFound, Unavailable
from emberfs.messages import Heartbeat, HeartbeatReply, Message
from emberfs.portal import Portal
from emberfs.routing import Node, Role
from emberfs.runtime import AsyncioRuntime
from emberfs.server import read_config
from emberfs.transport import TcpConfig, TcpNetwork, TlsFiles
from emberfs.transport.certificates import issue, make_authority

from tests.fs.cli_run import emberline

PATIENCE_S = 3.0


def ask(address: str, request: Message, config: TcpConfig) -> Message:
    """What a server answers to somebody who comes with `config`."""
    runtime = AsyncioRuntime("stranger")
    portal = Portal(runtime)
    network = TcpNetwork(runtime, config)

    async def call() -> Message:
        return await network.connection(address).call(request)

    try:
        return portal.run(call())
    finally:
        portal.run(network.close())
        runtime.stop()


@pytest.fixture
def manager(cluster: LocalCluster) -> str:
    """The address of the primary one."""
    with cluster.admin() as admin:
        return admin.status().primary


def heartbeat(name: str = "intruder") -> Heartbeat:
    return Heartbeat(Node(name, Role.STORAGE, "127.0.0.1:1", b"12345678"), [], 0)


def test_plaintext_is_refused(cluster: LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    other_order = "ember://" + ",".join(reversed(cluster.url.removeprefix("ember://").split(",")))
    with pytest.raises(Unavailable, match="has no credentials"):
        emberfs.connect(other_order, connect_timeout_s=PATIENCE_S)


def test_the_certificate_of_another_cluster_is_refused(cluster: LocalCluster, tmp_path: Path) -> None:
    make_authority(tmp_path / "ca", cluster="another", now_s=time.time())
    issue(tmp_path / "ca", ["client"], role="client", into=tmp_path / "client", now_s=time.time())
    other_order = "ember://" + ",".join(reversed(cluster.url.removeprefix("ember://").split(",")))
    with pytest.raises(AccessDenied, match="certificate"):
        emberfs.connect(other_order, credentials=str(tmp_path / "client"), connect_timeout_s=PATIENCE_S)


def test_a_client_cannot_pass_for_a_server(cluster: LocalCluster, manager: str) -> None:
    directory = cluster.directory / "client"
    files = TlsFiles(ca=directory / "ca.pem", cert=directory / "cert.pem", key=directory / "key.pem")
    with pytest.raises(AccessDenied, match="role 'client' does not make a 'storage'"):
        ask(manager, heartbeat(), TcpConfig(tls=files, role="storage"))


def test_a_client_may_not_say_what_only_servers_say(cluster: LocalCluster, manager: str) -> None:
    directory = cluster.directory / "client"
    files = TlsFiles(ca=directory / "ca.pem", cert=directory / "cert.pem", key=directory / "key.pem")
    with pytest.raises(AccessDenied, match="role 'client' may not send Heartbeat"):
        ask(manager, heartbeat(), TcpConfig(tls=files, role="client"))


def test_changing_the_cluster_takes_an_admin(cluster: LocalCluster) -> None:
    """Credentials of a client, which `up` leaves for this user, are enough to look at it."""
    with Admin(cluster.url) as client:
        before = client.routing()
        assert client.status().primary
        with pytest.raises(AccessDenied, match="a certificate of role admin"):
            client.drain_node("storage-1")
        with pytest.raises(AccessDenied, match="a certificate of role admin"):
            client.accept_loss(1, b"target")
        assert client.routing() == before
    with cluster.admin() as admin, pytest.raises(NotFound, match="nobody"):
        admin.drain_node("nobody")


def test_a_machine_joins_as_an_admin(cluster: LocalCluster, manager: str, tmp_path: Path) -> None:
    (token,) = emberline("cluster", "token", "--role", "admin", "--dir", cluster.directory).stdout.split()
    join_cluster(token, manager, into=tmp_path / "admin", names=["desk"])
    with Admin(cluster.url, credentials=str(tmp_path / "admin")) as admin, pytest.raises(NotFound, match="nobody"):
        admin.remove_node("nobody")
    with emberfs.connect(cluster.url, credentials=str(tmp_path / "admin")) as client:
        client.put("/by-the-admin", b"text")
        assert client.get("/by-the-admin") == b"text"


def test_a_server_of_the_cluster_is_let_in(cluster: LocalCluster, manager: str, tmp_path: Path) -> None:
    """The same question, from one who may ask it: what was refused above was not refused for something else."""
    files = issue(cluster.directory / "ca", ["new-1"], role="storage", into=tmp_path / "new", now_s=time.time())
    answer = ask(manager, heartbeat("new-1"), TcpConfig(tls=files, role="storage"))
    assert isinstance(answer, HeartbeatReply)


def test_a_storage_node_cannot_speak_as_another_one(cluster: LocalCluster, manager: str) -> None:
    server = cluster.server("storage-1")
    directory = Path(read_config(server.directory / "config.toml").tls.directory)
    files = TlsFiles(ca=directory / "ca.pem", cert=directory / "cert.pem", key=directory / "key.pem")
    with pytest.raises(AccessDenied, match=r"is for storage-1, .*not for a server named storage-2"):
        ask(manager, heartbeat("storage-2"), TcpConfig(tls=files, role="storage"))
