"""`connect`: from an address to a `KVCache`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from emberfs.cluster.store import tls_files
from emberfs.transport import TcpConfig

from .admission import PUT_POLICIES
from .breaker import BreakerConfig
from .client import KVCache
from .namespace import Namespace

BREAKER = BreakerConfig()


def connect(
    address: str,
    namespace: Namespace,
    *,
    tenant: str = "default",
    salt: bytes = b"",
    token: str = "",
    policy: str = "write-through",
    timeout_s: float = 10.0,
    store: str | None = None,
    tls: str | Path | None = None,
    shares_memory: bool = True,
    breaker: BreakerConfig = BREAKER,
    grants: bool = False,
    **store_settings: Any,
) -> KVCache:
    """Open a namespace of the service at `address`: `host:port`, `unix:/path`, or several with commas.

        tenant         whose pages; the token must be one of its own
        salt           more that keys depend on, so that nobody guesses them
        policy         which pages that are put are stored: "write-through" (all), "second-use" (when they are put
                       again), "on-evict" (all; the end of a prompt may come long before its beginning)
        timeout_s      seconds after which a request fails, beside those of the store
        store          URL of the store, if it is another one than the service says
        tls            directory with ca.pem, cert.pem and key.pem
        shares_memory  storage servers of this host fill our buffers in place
        breaker        after how many calls without an answer all are misses for a while
        grants         pages are read and written under grants: what `credentials` of a reader or writer need, and who
                       hands a hit to one. The service must have a key

    Other settings are those of `emberfs.connect`. The namespace is made if it is new. Raises Unavailable,
    DeadlineExceeded, AccessDenied, NamespaceMismatch.
    """
    if policy not in PUT_POLICIES:
        raise ValueError(f"policy is one of {', '.join(PUT_POLICIES)}, not {policy!r}")
    return KVCache(
        address,
        namespace,
        tenant=tenant,
        salt=salt,
        token=token,
        policy=policy,
        timeout_s=timeout_s,
        store=store,
        grants=grants,
        tcp=TcpConfig(tls=tls_files(None if tls is None else Path(tls)), shares_memory=shares_memory),
        breaker=breaker,
        store_settings={**store_settings, **({} if shares_memory else {"shares_memory": False})},
    )
