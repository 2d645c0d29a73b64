"""Who may speak to whom over TLS, how certificates are replaced, and how a machine gets its first one."""

from __future__ import annotations

import stat
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from emberfs.errors import AccessDenied
from emberfs.messages import (
    EVERYBODY,
    OPERATORS,
    SERVERS,
    AcceptLoss,
    AddNode,
    DrainNode,
    GetRouting,
    Heartbeat,
    Join,
    Joined,
    KvGet,
    Message,
    RemoveNode,
    SetConfig,
    SetupChains,
    Usage,
)
from emberfs.portal import Portal
from emberfs.routing import Node, Role
from emberfs.runtime import AsyncioRuntime
from emberfs.testing.transport import Echo, Run
from emberfs.transport import TcpConfig, TcpNetwork, TlsFiles, certificates
from emberfs.transport.certificates import (
    CA_FILE,
    CA_KEY_FILE,
    install,
    issue,
    make_authority,
    make_request,
    make_token,
    read_token,
    sign_request,
    verify_token,
)

HOST = "127.0.0.1"
MakeNetwork = Callable[[TcpConfig], TcpNetwork]


@pytest.fixture
def run() -> Iterator[Run]:
    runtime = AsyncioRuntime()
    yield Portal(runtime).run
    runtime.stop()


@pytest.fixture
def make_network(run: Run) -> Iterator[MakeNetwork]:
    made: list[TcpNetwork] = []

    def make(config: TcpConfig) -> TcpNetwork:
        # The runtime behind `run`: every network of a test lives on the same loop.
        made.append(TcpNetwork(run.__self__._runtime, config))  # type: ignore[attr-defined]
        return made[-1]

    yield make
    for network in made:
        run(network.close())


@pytest.fixture
def authority(tmp_path: Path) -> Path:
    make_authority(tmp_path / "authority", cluster="c1", now_s=time.time())
    return tmp_path / "authority"


@pytest.fixture
def server_files(authority: Path, tmp_path: Path) -> TlsFiles:
    return issue(authority, [HOST], role="storage", into=tmp_path / "server", now_s=time.time())


@pytest.fixture
def client_files(authority: Path, tmp_path: Path) -> TlsFiles:
    return issue(authority, ["laptop"], role="client", into=tmp_path / "client", now_s=time.time())


@pytest.fixture
def address(server_files: TlsFiles, make_network: MakeNetwork, run: Run) -> str:
    """Of a server with TLS."""
    listener = run(make_network(TcpConfig(cluster="c1", role="storage", tls=server_files)).serve(f"{HOST}:0", Echo()))
    return str(listener.address)


def ask(run: Run, network: TcpNetwork, address: str, request: Message | None = None) -> Message:
    """One call over a connection."""
    return run(network.connection(address).call(request or Usage()))  # type: ignore[no-any-return]


# ---- who is let in


def test_a_certificate_of_the_cluster_lets_in(
    address: str, client_files: TlsFiles, make_network: MakeNetwork, run: Run
) -> None:
    assert ask(run, make_network(TcpConfig(tls=client_files)), address) == Usage()


def test_a_direct_connection_needs_a_way_without_tls(
    address: str, client_files: TlsFiles, make_network: MakeNetwork, run: Run
) -> None:
    assert run(make_network(TcpConfig(tls=client_files, shares_memory=False)).open_direct(address)) is None
    direct = run(make_network(TcpConfig(tls=client_files)).open_direct(address))  # Through the door.
    assert direct.try_begin()
    assert direct.call(Usage(), timeout_s=20.0) == Usage()
    direct.end()


def test_no_certificate(address: str, server_files: TlsFiles, make_network: MakeNetwork, run: Run) -> None:
    with pytest.raises(AccessDenied, match="certificate"):
        ask(run, make_network(TcpConfig(tls=TlsFiles(ca=server_files.ca))), address)


def test_a_certificate_of_another_cluster(
    address: str, server_files: TlsFiles, tmp_path: Path, make_network: MakeNetwork, run: Run
) -> None:
    make_authority(tmp_path / "foreign", cluster="c1", now_s=time.time())
    files = issue(tmp_path / "foreign", [HOST], role="client", into=tmp_path / "stranger", now_s=time.time())
    with pytest.raises(AccessDenied):  # The client does not believe the server.
        ask(run, make_network(TcpConfig(tls=files)), address)
    with pytest.raises(AccessDenied):  # The server does not believe the client.
        ask(run, make_network(TcpConfig(tls=TlsFiles(ca=server_files.ca, cert=files.cert, key=files.key))), address)


def test_a_role_that_the_certificate_does_not_give(
    address: str, client_files: TlsFiles, make_network: MakeNetwork, run: Run
) -> None:
    with pytest.raises(AccessDenied, match="'client' does not make a 'manager'"):
        ask(run, make_network(TcpConfig(role="manager", tls=client_files)), address)


@pytest.mark.parametrize("role", ["client", "admin"])
def test_a_client_cannot_serve_under_the_name_of_a_server(
    role: str, authority: Path, server_files: TlsFiles, tmp_path: Path, make_network: MakeNetwork, run: Run
) -> None:
    token = make_token(authority, role=role, valid_s=60, now_s=time.time())
    key, csr = make_request([HOST], role=role)  # The names are its own choice.
    cert = sign_request(authority, token=token, csr=csr, now_s=time.time())
    files = install(tmp_path / "own", key=key, cert=cert, ca=server_files.ca.read_bytes())
    listener = run(make_network(TcpConfig(cluster="c1", role="manager", tls=files)).serve(f"{HOST}:0", Echo()))
    with pytest.raises(AccessDenied, match="purpose"):
        ask(run, make_network(TcpConfig(cluster="c1", role="storage", tls=server_files)), listener.address)


def test_a_role_that_does_not_serve_is_refused_whatever_tls_says(
    authority: Path,
    client_files: TlsFiles,
    tmp_path: Path,
    make_network: MakeNetwork,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(certificates, "SERVERS", EVERYBODY)
    files = issue(authority, [HOST], role="client", into=tmp_path / "own", now_s=time.time())
    listener = run(make_network(TcpConfig(cluster="c1", role="manager", tls=files)).serve(f"{HOST}:0", Echo()))
    with pytest.raises(AccessDenied, match="role 'client', not that of a server"):
        ask(run, make_network(TcpConfig(tls=client_files)), listener.address)


def test_a_server_under_another_name(
    authority: Path, client_files: TlsFiles, tmp_path: Path, make_network: MakeNetwork, run: Run
) -> None:
    files = issue(authority, ["elsewhere"], role="storage", into=tmp_path / "elsewhere", now_s=time.time())
    listener = run(make_network(TcpConfig(tls=files)).serve(f"{HOST}:0", Echo()))
    with pytest.raises(AccessDenied, match=HOST):
        ask(run, make_network(TcpConfig(tls=client_files)), listener.address)


def test_plain_text_to_a_server_with_tls(address: str, make_network: MakeNetwork, run: Run) -> None:
    with pytest.raises((AccessDenied, ConnectionError)):
        ask(run, make_network(TcpConfig()), address)


def test_tls_to_a_server_in_plain_text(client_files: TlsFiles, make_network: MakeNetwork, run: Run) -> None:
    listener = run(make_network(TcpConfig()).serve(f"{HOST}:0", Echo()))
    with pytest.raises((AccessDenied, ConnectionError)):
        ask(run, make_network(TcpConfig(tls=client_files)), listener.address)


def test_an_expired_certificate(
    address: str, authority: Path, tmp_path: Path, make_network: MakeNetwork, run: Run
) -> None:
    long_ago = time.time() - 2 * 365 * 24 * 3600
    files = issue(authority, [HOST], role="client", into=tmp_path / "old", now_s=long_ago)
    with pytest.raises(AccessDenied):
        ask(run, make_network(TcpConfig(tls=files)), address)


# ---- who may send what

HEARTBEAT = Heartbeat(Node("meta-1", Role.META, "127.0.0.1:1", b"12345678"), [], 0)
FOR_OPERATORS = [
    SetConfig(1, {}),
    SetupChains(1, 1),
    AddNode("n"),
    DrainNode("n"),
    RemoveNode("n"),
    AcceptLoss(1, b"t"),
]
FOR_SERVERS = [HEARTBEAT, KvGet([b"key"])]


@pytest.mark.parametrize(
    ("role", "allowed", "refused"),
    [
        ("client", [Usage(), GetRouting()], FOR_OPERATORS + FOR_SERVERS),
        ("admin", [Usage(), GetRouting(), *FOR_OPERATORS], FOR_SERVERS),
        ("meta", [Usage(), GetRouting(), *FOR_OPERATORS, *FOR_SERVERS], []),
        ("gardener", [], [Usage(), *FOR_OPERATORS, *FOR_SERVERS]),
    ],
)
def test_what_a_role_may_send(
    role: str,
    allowed: list[Message],
    refused: list[Message],
    address: str,
    authority: Path,
    tmp_path: Path,
    make_network: MakeNetwork,
    run: Run,
) -> None:
    files = issue(authority, [HOST, "meta-1"], role=role, into=tmp_path / "own", now_s=time.time())
    network = make_network(TcpConfig(role=role, tls=files))
    for request in allowed:
        assert ask(run, network, address, request) == request
    for request in refused:
        with pytest.raises(AccessDenied, match=f"role '{role}' may not send {type(request).__name__}"):
            ask(run, network, address, request)


@pytest.mark.parametrize(
    ("names", "role", "says"),
    [
        (["meta-1", HOST], "meta", None),
        ([HOST, "meta-2", "meta-1"], "meta", None),
        ([HOST, "meta-2"], "meta", "is for 127.0.0.1, meta-2, and not for a server named meta-1"),
        (["meta-1", HOST], "storage", "role 'storage' does not speak for a meta server"),
    ],
)
def test_a_server_speaks_as_the_nodes_that_its_certificate_names(
    names: list[str],
    role: str,
    says: str | None,
    address: str,
    authority: Path,
    tmp_path: Path,
    make_network: MakeNetwork,
    run: Run,
) -> None:
    files = issue(authority, names, role=role, into=tmp_path / "own", now_s=time.time())
    network = make_network(TcpConfig(role=role, tls=files))
    if says is None:
        assert ask(run, network, address, HEARTBEAT) == HEARTBEAT
        return
    with pytest.raises(AccessDenied, match=says):
        ask(run, network, address, HEARTBEAT)


def test_who_is_refused_as_an_operator_is_told_what_it_takes(
    address: str, client_files: TlsFiles, make_network: MakeNetwork, run: Run
) -> None:
    with pytest.raises(AccessDenied, match="emberline cluster token --role admin"):
        ask(run, make_network(TcpConfig(tls=client_files)), address, DrainNode("n"))


def test_any_certificate_makes_a_client_and_keeps_its_rights(
    address: str, authority: Path, tmp_path: Path, make_network: MakeNetwork, run: Run
) -> None:
    files = issue(authority, ["desk"], role="admin", into=tmp_path / "own", now_s=time.time())
    network = make_network(TcpConfig(role="client", tls=files))
    assert ask(run, network, address, DrainNode("n")) == DrainNode("n")
    with pytest.raises(AccessDenied, match="role 'admin' may not send Heartbeat"):
        ask(run, network, address, HEARTBEAT)


def test_a_new_message_is_for_servers_only() -> None:
    assert Message.may_send == SERVERS < OPERATORS < EVERYBODY


def test_without_tls_there_are_no_roles(make_network: MakeNetwork, run: Run) -> None:
    listener = run(make_network(TcpConfig()).serve(f"{HOST}:0", Echo()))
    assert ask(run, make_network(TcpConfig()), listener.address, HEARTBEAT) == HEARTBEAT


# ---- rotation


def test_a_new_authority_without_a_restart(
    address: str, client_files: TlsFiles, tmp_path: Path, make_network: MakeNetwork, run: Run
) -> None:
    old = make_network(TcpConfig(tls=client_files))
    assert ask(run, old, address) == Usage()
    make_authority(tmp_path / "next", cluster="c1", now_s=time.time())
    issue(tmp_path / "next", [HOST], role="storage", into=tmp_path / "server", now_s=time.time())
    assert ask(run, old, address) == Usage(), "a connection that exists goes on"
    with pytest.raises(AccessDenied):
        ask(run, make_network(TcpConfig(tls=client_files)), address)
    issue(tmp_path / "next", ["laptop"], role="client", into=tmp_path / "client", now_s=time.time())
    assert ask(run, make_network(TcpConfig(tls=client_files)), address) == Usage()


def test_half_replaced_files_do_not_stop_a_server(
    address: str, authority: Path, server_files: TlsFiles, client_files: TlsFiles, make_network: MakeNetwork, run: Run
) -> None:
    assert ask(run, make_network(TcpConfig(tls=client_files)), address) == Usage()
    assert server_files.key is not None
    server_files.key.write_bytes(make_request(["other"], role="storage")[0])
    assert ask(run, make_network(TcpConfig(tls=client_files)), address) == Usage()


# ---- joining


class Registrar:
    """Signs for who has a token."""

    def __init__(self, authority: Path) -> None:
        self._authority = authority

    async def handle(self, request: Message, buffers: Sequence[memoryview] = ()) -> Message:
        assert isinstance(request, Join)
        cert = sign_request(self._authority, token=request.token, csr=request.csr, now_s=time.time())
        return Joined(cert, (self._authority / CA_FILE).read_bytes())


def test_a_machine_joins_with_nothing_but_a_token(
    authority: Path, server_files: TlsFiles, address: str, tmp_path: Path, make_network: MakeNetwork, run: Run
) -> None:
    config = TcpConfig(cluster="c1", role="storage", tls=server_files, admits_strangers=True)
    manager = run(make_network(config).serve(f"{HOST}:0", Registrar(authority))).address
    token = make_token(authority, role="storage", valid_s=60, now_s=time.time())

    said = read_token(token)
    (tmp_path / "trusted.pem").write_text(said.ca_pem)
    stranger = make_network(TcpConfig(cluster=said.cluster, role=said.role, tls=TlsFiles(ca=tmp_path / "trusted.pem")))
    with pytest.raises(AccessDenied, match="only join"):
        ask(run, stranger, manager)
    key, csr = make_request([HOST], role=said.role)
    joined = run(stranger.connection(manager).call(Join(token, csr)))
    files = install(tmp_path / "own", key=key, cert=joined.cert, ca=joined.ca)
    assert ask(run, make_network(TcpConfig(cluster="c1", role="storage", tls=files)), address) == Usage()


def test_a_token_gives_its_own_role_only(authority: Path, tmp_path: Path) -> None:
    token = make_token(authority, role="client", valid_s=60, now_s=1e9)
    _, csr = make_request([HOST], role="manager")
    cert = sign_request(authority, token=token, csr=csr, now_s=1e9)
    assert _roles(cert) == ["client"]


def _roles(cert: bytes) -> list[str]:
    from cryptography import x509

    subject = x509.load_pem_x509_certificate(cert).subject
    return [str(each.value) for each in subject.get_attributes_for_oid(x509.NameOID.ORGANIZATIONAL_UNIT_NAME)]


def test_tokens_that_are_not_taken(authority: Path, tmp_path: Path) -> None:
    token = make_token(authority, role="storage", valid_s=60, now_s=1e9)
    assert verify_token(authority, token, now_s=1e9 + 59).role == "storage"
    with pytest.raises(AccessDenied, match="expired"):
        verify_token(authority, token, now_s=1e9 + 60)
    make_authority(tmp_path / "foreign", cluster="c1", now_s=1e9)
    with pytest.raises(AccessDenied, match="not of this cluster"):
        verify_token(tmp_path / "foreign", token, now_s=1e9)
    for place in range(11, len(token), 40):
        forged = token[:place] + ("A" if token[place] != "A" else "B") + token[place + 1 :]
        with pytest.raises(AccessDenied):
            verify_token(authority, forged, now_s=1e9)
    for noise in ("", "ember-join-", "ember-join-AAAA", "ä"):
        with pytest.raises(AccessDenied):
            verify_token(authority, noise, now_s=1e9)


def test_what_is_no_request_is_not_signed(authority: Path) -> None:
    token = make_token(authority, role="storage", valid_s=60, now_s=1e9)
    with pytest.raises(AccessDenied, match="signing request"):
        sign_request(authority, token=token, csr=b"nonsense", now_s=1e9)


def test_private_keys_are_their_owners_only(authority: Path, server_files: TlsFiles) -> None:
    assert server_files.key is not None
    for path in (authority / CA_KEY_FILE, server_files.key):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_an_authority_is_not_made_twice(authority: Path) -> None:
    with pytest.raises(FileExistsError):
        make_authority(authority, cluster="c1", now_s=1e9)
