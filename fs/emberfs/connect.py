"""`connect`: from a URL to a client."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from .client import AsyncClient, Client
from .embedded import StoreConfig
from .errors import InvalidPath
from .stores import Config, resolve
from .urls import cluster_addresses


def connect(url: str | None = None, **settings: Any) -> Client:
    """Open the store at `url` (made if it is not there), or at EMBERLINE_URL.

    `ember:///path/to/dir` is an embedded store: everything in this process, no service to start. The settings, which
    are the fields of `StoreConfig`:

        targets        directories that new files are dealt over, 1 to 256; fixed when the store is made. Default 1
        reserve_bytes  bytes: new data is refused when the disk has less than this left. Default 64 MiB
        gc_delay_s     seconds that readers of a removed or replaced file may go on. Default 300
        trash_s        seconds that removed files stay in the trash. Default 604800, a week

    They hold for this process, `targets` apart.

    `ember://host:port,host:port` is a cluster, by the addresses of its managers. Its settings, which are the fields of
    `ClientConfig`:

        credentials        directory with ca.pem, cert.pem and key.pem. Default: those `cluster up` left
        connect_timeout_s  seconds to wait for a manager. Default 10
        deadline_s         seconds after which an operation that could not be done fails. Default 30
        read_from          the replica that is asked first: load, round_robin, head or tail. Default load
        relaxed            reads may return what was true a moment ago. Default False
        uncommitted        reads may return what is being written and may never be acknowledged. Default False
        shares_memory      servers of this host read and write our memory in place. Default True
        ucx                large buffers go by UCX, unencrypted, where servers have it: auto, or some of rdma,shm,tcp.
                           Default "": they do not. See docs/operations.md

    Several processes of a host may open one embedded store: see docs/decisions/0010-sharing.md. Then the settings are
    those of the process that was first.

    Raises StoreBusy when another process owns the store and cannot share it, DeadlineExceeded when that one does not
    answer (it is stopped), StoreFormat, Unavailable, AccessDenied, InvalidPath (a URL or a setting that is not one),
    LimitExceeded (a setting out of its range).
    """
    return Client(url, _config(url, settings))


def connect_async(url: str | None = None, **settings: Any) -> AsyncClient:
    """`connect` for programs with an event loop. Opening itself is quick and blocks; every later call is awaited."""
    return AsyncClient(url, _config(url, settings))


def _config(url: str | None, settings: dict[str, Any]) -> Config | None:
    if not settings:
        return None
    made: type[Any] = StoreConfig
    if cluster_addresses(resolve(url)):
        from .cluster import ClientConfig as made  # An embedded store needs no network.
    known = [field.name for field in fields(made)]
    if unknown := [name for name in settings if name not in known]:
        raise InvalidPath(f"no such setting: {', '.join(unknown)}; the settings are {', '.join(known)}")
    config: Config = made(**settings)
    return config
