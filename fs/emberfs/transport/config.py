"""What one process says of itself on the network, and how long it waits for others."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from .frame import HEADER_BYTES_MAX, PAYLOAD_BYTES_MAX
from .turns import LoadConfig

CLIENT_ROLE = "client"
CONNECT_PATIENCE_MAX = 4
"""Times `connect_timeout_s`: what a server gives each client to greet, and a client the server that was slow before."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TlsFiles:
    """PEM files. They are looked at before each handshake: replace them, and new connections use the new ones."""

    ca: Path
    """The authorities to trust; several in one file while they are being changed."""
    cert: Path | None = None
    """None: a machine that joins has no certificate yet."""
    key: Path | None = None

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            raise ValueError("a certificate and its key go together")


UCX_KINDS = ("rdma", "shm", "tcp")
"""Kinds of device, best first."""
UCX_AUTO = "auto"


def ucx_kinds(text: str) -> tuple[str, ...]:
    """The kinds that a setting names, best first: `auto`, or some of `UCX_KINDS` with commas. Raises ValueError."""
    kinds = UCX_KINDS if text == UCX_AUTO else tuple(part.strip() for part in text.split(",") if text)
    if unknown := [kind for kind in kinds if kind not in UCX_KINDS]:
        raise ValueError(f"ucx is {UCX_AUTO}, or some of {', '.join(UCX_KINDS)}; not {', '.join(unknown)!r}")
    return kinds


@dataclass(frozen=True, kw_only=True, slots=True)
class TcpConfig:
    """Options of `TcpNetwork`."""

    cluster: str = ""
    """The cluster's id. A client may leave it empty and take whoever answers."""
    role: str = CLIENT_ROLE
    """What this process is. A certificate, if it has one, must say the same; but any certificate makes a client."""
    token: str = ""
    """A secret that peers without a certificate must know. Empty: there is none."""
    tls: TlsFiles | None = None
    """None: no TLS, which only loopback addresses and unix sockets allow."""
    insecure: bool = False
    """Plain text to and from other machines is all right."""
    admits_strangers: bool = False
    """As a server with TLS: take a `Join`, and nothing else, from peers that have no certificate."""
    shares_memory: bool = True
    """As a server: take memory of clients on this host, and read and write it in place. As a client: hand it over."""
    ucx: str = ""
    """Let large buffers go by UCX where the other side has it too: `auto`, or kinds of device as `ucx_kinds` has them.

    They are not encrypted, and UCX trusts whom it speaks to: for a network of one's own. Empty: no.
    """
    connect_timeout_s: float = 2.0
    """For the whole way to a handshake, at the first attempt."""
    ping_s: float = 1.0
    """A sign of life goes out this often."""
    dead_s: float = 3.0
    """A peer that was silent for so long is dead."""
    stall_s: float = 15.0
    """A peer that lives and takes none of the bytes that wait for it is given up after so long."""
    backoff_s_max: float = 0.5
    """The longest pause between two attempts to connect."""
    calls_max: int = 4096
    """As a server: calls under way on one connection."""
    bytes_max: int = 128 << 20
    """As a server: bytes of requests and of buffers to fill under way on one connection."""
    load: LoadConfig = field(default_factory=LoadConfig)
    """As a server: what is taken on over all connections of one address."""

    def __post_init__(self) -> None:
        if not 0 < self.ping_s < self.dead_s:
            raise ValueError(f"ping_s must be in (0, dead_s), not {self.ping_s} of {self.dead_s}")
        ucx_kinds(self.ucx)
        if self.connect_timeout_s <= 0 or self.backoff_s_max <= 0 or self.stall_s <= 0:
            raise ValueError("connect_timeout_s, stall_s and backoff_s_max must be above 0")
        if self.calls_max < 1:
            raise ValueError(f"calls_max must be at least 1, not {self.calls_max}")
        if self.bytes_max < HEADER_BYTES_MAX + PAYLOAD_BYTES_MAX:
            raise ValueError(f"bytes_max has no room for one large message: {self.bytes_max}")
