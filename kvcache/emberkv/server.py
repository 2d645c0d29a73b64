"""A KV-cache server process: the service, its network, and how it starts and stops.

    SIGTERM, SIGINT   let the namespaces go, so that the next server need not wait; exit 0

It says `ready` on one line of its standard output, as JSON with its address, once it serves.
"""

from __future__ import annotations

import json
import os
import queue
import sys
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import emberfs
from emberfs.cluster.store import tls_files
from emberfs.portal import Portal
from emberfs.runtime import AsyncioRuntime
from emberfs.server.metrics import serve_page
from emberfs.stop import Stop
from emberfs.transport import TcpConfig, TcpNetwork
from emberfs.transport.address import named
from emberfs.transport.grant_keys import GrantKeys

from .events import EventFeed
from .figures import Figures
from .files import StoreFiles
from .grants import WRITTEN_S, Granter
from .metrics import KvCollector
from .pools import NAMESPACES_MAX
from .publisher import Publisher
from .service import KvService
from .space import SpaceConfig
from .tenants import EVERYBODY, read_tenants

LOOK_S = 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerConfig:
    """A server."""

    store: str
    """URL of the store; clients reach the pages by it too."""
    root: str = "/kv"
    """A directory of the store: each namespace is one in it."""
    listen: str = "127.0.0.1:7400"
    """host:port, of which :0 lets the system choose, or unix:/path."""
    space: SpaceConfig = field(default_factory=lambda: SpaceConfig(capacity_bytes=10 << 30))
    """Of each namespace."""
    namespaces_max: int = NAMESPACES_MAX
    tenants: Path | None = None
    """A file of tokens; None: whoever reaches the port may do everything."""
    grants: Path | None = None
    """A file of keys that grants for readers are made with, the same as the storage servers'; None: there are none."""
    tls: Path | None = None
    """Directory with ca.pem, cert.pem and key.pem."""
    events: str = ""
    """ZeroMQ endpoint where KV events are published, such as tcp://*:5557; "": nowhere."""
    events_replay: str = ""
    """Another one, where subscribers ask for those that they lost."""
    events_tokens: bool = False
    """Tell there the tokens of pages, where who puts them tells them: they are the prompts."""
    metrics: str = ""
    """host:port of a page for Prometheus; "": there is none."""


def run_server(config: ServerConfig) -> None:
    """Serve until told to stop. Raises what the store or the address raises."""
    stop = Stop()
    runtime = AsyncioRuntime("emberkv")
    portal = Portal(runtime)
    network = TcpNetwork(runtime, TcpConfig(tls=tls_files(config.tls)))
    client = emberfs.connect_async(config.store)
    feed = EventFeed(tells_tokens=config.events_tokens) if config.events else None
    files = StoreFiles(client)
    keys = None if config.grants is None else GrantKeys(config.grants)
    service = KvService(
        files,
        runtime,
        root=config.root,
        store=config.store,
        config=config.space if keys is None else replace(config.space, granted_s=WRITTEN_S),
        namespaces_max=config.namespaces_max,
        tenants=EVERYBODY if config.tenants is None else read_tenants(config.tenants),
        events=feed,
        granter=None if keys is None else Granter(keys, files, runtime),
    )
    publisher: Publisher | None = None
    end_metrics: Callable[[], None] | None = None
    try:
        with named(config.listen):
            listener = portal.run(network.serve(config.listen, service))
        service.pools.address = listener.address
        if config.metrics:
            with named(config.metrics):
                end_metrics = serve_page([KvCollector(lambda: portal.run(_figures(service)))], config.metrics)
        if feed is not None:
            publisher = Publisher(feed, runtime, endpoint=config.events, replay_endpoint=config.events_replay)
        opened: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
        # A standby is there until the owner ends, and may be told to stop before that.
        portal.begin(_in_loop(runtime, _opened(service, publisher)), lambda _, error: opened.put(error))
        _wait_for_end(stop, opened, listener.address, keys)
    finally:
        if end_metrics is not None:
            end_metrics()
        if publisher is not None:
            portal.run(_in_loop(runtime, publisher.close()))
        portal.run(_in_loop(runtime, service.close()))
        portal.run(network.close())
        portal.run(_in_loop(runtime, client.close()))
        runtime.stop()


def _wait_for_end(
    stop: Stop, opened: queue.SimpleQueue[Exception | None], address: str, keys: GrantKeys | None
) -> None:
    """Say that we are ready once we are. Raises why the namespaces could not be opened."""
    while not stop.wait(LOOK_S):
        if keys is not None:
            keys.look()
        if opened.empty():
            continue
        if (error := opened.get()) is not None:
            raise error
        sys.stdout.write(json.dumps({"ready": True, "address": address, "pid": os.getpid()}) + "\n")
        sys.stdout.flush()


async def _in_loop(runtime: AsyncioRuntime, work: Coroutine[Any, Any, None]) -> None:
    """The store's client is for programs with an event loop: this one's is the runtime's."""
    await runtime.enter_loop()
    await work


async def _opened(service: KvService, publisher: Publisher | None) -> None:
    service.start()
    if publisher is not None:
        publisher.start()
    await service.pools.open_all()


async def _figures(service: KvService) -> Figures:
    """In the service's own turn: nothing changes while they are taken."""
    return service.figures()
