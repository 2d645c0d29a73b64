"""The first frame each way: who one is, and whether one may come in.

The client says which protocols it speaks, which cluster it means, what it is and the token if it has one; the server
answers with the protocol to speak and its limits, or with an error. A certificate counts as a token does, and binds
its owner to the role and the names written in it: nobody serves, or sends a request, for which that role will not do,
nor speaks as a node of another name.

Does not know: sockets. `Certificate` is what TLS has proved already.
"""

from __future__ import annotations

import functools
import hmac
import os
import ssl
from dataclasses import dataclass
from pathlib import Path

import msgspec

from ..errors import AccessDenied, ProtocolError
from ..messages.base import GRANTED, OPERATORS, SERVERS, Message
from ..routing import Node
from .config import CLIENT_ROLE, TcpConfig
from .frame import HEADER_BYTES_MAX, PAYLOAD_BYTES_MAX, PROTOCOL_MAX, PROTOCOL_MIN


class Hello(msgspec.Struct, array_like=True):
    """What either side says first. Fields are added at the end with a default, never moved."""

    protocol_min: int
    protocol_max: int
    """Inclusive; a server answers with the one to speak in both."""
    cluster: str
    role: str
    token: str = ""
    calls_max: int = 0
    """Of a server: how many calls may be under way."""
    bytes_max: int = 0
    """Of a server: how many bytes of them."""
    door: str = ""
    """Of a server: where clients of its own host may come instead, and hand over memory. Empty: nowhere."""
    key: str = ""
    """Of a server: the token to say there. It is good once, and makes the client what it is here."""
    host: str = ""
    """Of a server: the host of `door`, or of `rails`; see `this_host`."""
    lanes: bool = False
    """Of a server: it serves lanes, to who came through its door or needs no TLS."""
    rails: list[str] = []
    """Of a server: the kinds of device that it takes rails over."""


class RailOffer(msgspec.Struct, array_like=True):
    """An end of a rail, as it is told to the other side."""

    kind: str
    """Of device."""
    address: bytes
    """What UCX connects to. Empty: there is no such rail here, go on without."""


@dataclass(frozen=True, slots=True)
class Certificate:
    """What a peer has proved about itself."""

    names: tuple[str, ...]
    """Of hosts and of nodes; the first is the machine's own."""
    role: str
    tenant: str = ""
    """Of a reader or writer: whose grants it may show; "": anybody's."""


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Hello)
_offer_decoder = msgspec.msgpack.Decoder(RailOffer)


@functools.cache
def this_host() -> str:
    """The running system and its network, as processes that can reach each other's abstract sockets see it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.stat('/proc/self/ns/net').st_ino}"
    except OSError:
        return ""


def encode_hello(hello: Hello) -> bytes:
    return _encoder.encode(hello)


def decode_hello(body: memoryview) -> Hello:
    """Raises ProtocolError."""
    try:
        return _decoder.decode(body)
    except (msgspec.MsgspecError, ValueError) as error:
        raise ProtocolError(f"not a greeting that this program knows: {error}") from error


def encode_offer(offer: RailOffer) -> bytes:
    return _encoder.encode(offer)


def decode_offer(body: memoryview) -> RailOffer:
    """Raises ProtocolError."""
    try:
        return _offer_decoder.decode(body)
    except (msgspec.MsgspecError, ValueError) as error:
        raise ProtocolError(f"not a rail that this program knows: {error}") from error


def client_hello(config: TcpConfig, *, key: str = "") -> Hello:
    """`key`: what the server gave us for its door."""
    return Hello(PROTOCOL_MIN, PROTOCOL_MAX, config.cluster, config.role, key or config.token)


def answer_hello(config: TcpConfig, theirs: Hello, *, certificate: Certificate | None, is_stranger: bool) -> Hello:
    """What a server says to a client. `is_stranger`: over TLS without a certificate, so that it can but join.

    Raises ProtocolError, AccessDenied.
    """
    protocol = min(PROTOCOL_MAX, theirs.protocol_max)
    if protocol < max(PROTOCOL_MIN, theirs.protocol_min):
        raise ProtocolError(
            f"the server speaks protocols {PROTOCOL_MIN} to {PROTOCOL_MAX}, "
            f"the client {theirs.protocol_min} to {theirs.protocol_max}"
        )
    if theirs.cluster and theirs.cluster != config.cluster:
        raise AccessDenied(f"this is a server of cluster {config.cluster!r}, not of {theirs.cluster!r}")
    if certificate is not None:
        if theirs.role not in (certificate.role, CLIENT_ROLE):
            raise AccessDenied(f"a certificate for role {certificate.role!r} does not make a {theirs.role!r}")
    elif is_stranger:
        if not config.admits_strangers:
            raise AccessDenied(
                "this server wants a certificate of its cluster; a manager that has `authority` gives one"
            )
    elif config.token and not hmac.compare_digest(config.token.encode(), theirs.token.encode()):
        raise AccessDenied("the token is missing, or is not that of this cluster")
    return Hello(
        protocol, protocol, config.cluster, config.role, calls_max=config.calls_max, bytes_max=config.bytes_max
    )


def accept_answer(config: TcpConfig, answer: Hello, *, certificate: Certificate | None) -> None:
    """The client looks at what the server said, and has proved. Raises ProtocolError, AccessDenied."""
    if certificate is not None and certificate.role not in SERVERS:
        raise AccessDenied(f"who answers has a certificate for role {certificate.role!r}, not that of a server")
    if not PROTOCOL_MIN <= answer.protocol_max <= PROTOCOL_MAX:
        raise ProtocolError(f"the server wants to speak protocol {answer.protocol_max}")
    if answer.calls_max < 1 or answer.bytes_max < HEADER_BYTES_MAX + PAYLOAD_BYTES_MAX:
        raise ProtocolError("the server has no room for the largest message")
    if config.cluster and answer.cluster != config.cluster:
        raise AccessDenied(f"a server of cluster {answer.cluster!r} answers, not one of {config.cluster!r}")


def check_sender(request: Message, certificate: Certificate | None) -> None:
    """May the peer send this request? Without certificates there are no roles and no names. Raises AccessDenied."""
    if certificate is None:
        return
    if certificate.role in request.may_send:
        _check_node(request.speaks_as, certificate)
        return
    hint = ""
    if request.may_send is OPERATORS:
        hint = (
            ": it takes a certificate of role admin. Get one with `emberline cluster token --role admin` and "
            "`emberline cluster join`, or name a cluster of this host with --dir or EMBERLINE_CLUSTER"
        )
    if certificate.role in GRANTED:
        hint = ": it does what grants name, and nothing else. For a KV cache, connect with grants=True"
    raise AccessDenied(f"a certificate for role {certificate.role!r} may not send {type(request).__name__}{hint}")


def _check_node(node: Node | None, certificate: Certificate) -> None:
    """May the peer speak as `node`? Else a server's certificate would do for taking over any other node."""
    if node is None:
        return
    if node.role != certificate.role:
        raise AccessDenied(f"a certificate for role {certificate.role!r} does not speak for a {node.role} server")
    if node.name not in certificate.names:
        raise AccessDenied(
            f"the certificate is for {', '.join(certificate.names)}, and not for a server named {node.name}: get one "
            f"with `emberline cluster join ... --name {node.name}`"
        )


def certificate_of(sock: object) -> Certificate | None:
    """What the peer of a connected socket has proved; None without TLS, or without a certificate."""
    proved = sock.getpeercert() if isinstance(sock, ssl.SSLSocket) else None
    if not proved:
        return None
    fields = dict(field for group in proved["subject"] for field in group)  # type: ignore[misc]
    others = [str(name) for _, name in proved.get("subjectAltName", ())]  # type: ignore[str-unpack]
    names = dict.fromkeys([str(fields.get("commonName", "")), *others])
    role, _, tenant = str(fields.get("organizationalUnitName", "")).partition(":")
    return Certificate(tuple(names), role, tenant)
