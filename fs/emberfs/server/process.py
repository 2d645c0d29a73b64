"""A server process: one role, its network, its metrics page, and how it starts and stops.

    SIGTERM, SIGINT   take no new call, let those in the air end (drain_s), close, exit 0
    SIGHUP            nothing to do: certificates are looked at before each handshake

It says `ready` on one line of its standard output, as JSON with its address, once it serves; systemd is told too.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from ..errors import Unavailable
from ..lane import native
from ..lane.server import LaneServer
from ..messages import Message
from ..portal import Portal
from ..routing import Role
from ..runtime import AsyncioRuntime
from ..stop import Stop
from ..transport import TcpConfig, TcpNetwork, TlsFiles
from ..transport.address import named
from ..transport.grant_keys import GrantKeys
from ..transport.types import Listener, Service
from .config import ServerConfig
from .metrics import Metered, serve_metrics
from .roles import Served, open_role

LOOK_S = 1.0
"""How often it is looked whether the role has to end."""

log = logging.getLogger("emberline.server")


def run_server(config: ServerConfig) -> None:
    """Serve until told to stop. Raises what opening the role raises."""
    _start_log(config)
    stop = Stop()
    signal.signal(signal.SIGHUP, lambda *_: None)
    runtime = AsyncioRuntime(config.name)
    portal = Portal(runtime)
    lanes = LaneServer() if native is not None and config.role == Role.STORAGE else None
    keys = GrantKeys(Path(config.storage.grants)) if config.storage.grants else None
    network = TcpNetwork(
        runtime, tcp_config(config), adopt_lane=None if lanes is None else lanes.adopt, grant_keys=keys
    )
    if lanes is not None and keys is not None:
        lanes.set_keys(keys.keys)
    door = _Door()
    role: Served | None = None
    end_metrics: Callable[[], None] | None = None
    try:
        # The address first: who cannot have it is a second one of us, and leaves the disk alone.
        with named(config.listen):
            listener = portal.run(network.serve(config.listen, Metered(door, network.meter)))
        role = portal.run(open_role(config, runtime, network, lanes=lanes))
        door.service = role.service
        portal.run(role.start())
        if config.metrics:
            with named(config.metrics):
                end_metrics = serve_metrics(network.meter, role.gauges, config.metrics)
        _serve(config, role, listener, stop, lambda: _renew_keys(keys, lanes))
        portal.run(role.retire())
        portal.run(listener.close(drain_s=config.drain_s))
    finally:
        if end_metrics is not None:
            end_metrics()
        # Of what cannot be closed the first error is told, and the process ends all the same.
        try:
            if role is not None:
                portal.run(role.close())
            portal.run(network.close())
        except Exception:
            log.exception("closing")
        if lanes is not None:
            lanes.stop()
        runtime.stop()


def _renew_keys(keys: GrantKeys | None, lanes: LaneServer | None) -> None:
    """Go by those that are in the file now."""
    if keys is not None and keys.look() and lanes is not None:
        lanes.set_keys(keys.keys)


def _serve(config: ServerConfig, role: Served, listener: Listener, stop: Stop, look: Callable[[], None]) -> None:
    """Say that we serve, and return when it is time to stop; `look` after what may change meanwhile."""
    log.info("%s %s serves at %s", config.role, config.name, listener.address)
    sys.stdout.write(json.dumps({"ready": True, "address": listener.address, "pid": os.getpid()}) + "\n")
    sys.stdout.flush()
    _tell_systemd("READY=1")
    while not stop.wait(LOOK_S):
        if reason := role.must_stop():
            log.error("stopping: %s", reason)
            break
        look()
    log.info("stopping: calls in the air have %.0f s", config.drain_s)
    _tell_systemd("STOPPING=1")


class _Door:
    """What is served while the role still opens: nothing."""

    def __init__(self) -> None:
        self.service: Service | None = None

    def handle(self, request: Message, buffers: Sequence[memoryview] = ()) -> Awaitable[Message]:
        """Serve one request. Raises Unavailable until there is a service."""
        if self.service is None:
            raise Unavailable("the server is starting")
        return self.service.handle(request, buffers)


def tcp_config(config: ServerConfig) -> TcpConfig:
    """What the network of a server is told."""
    tls = None
    if config.tls.directory:
        directory = Path(config.tls.directory)
        tls = TlsFiles(ca=directory / "ca.pem", cert=directory / "cert.pem", key=directory / "key.pem")
    return TcpConfig(
        cluster=config.cluster,
        role=config.role,
        tls=tls,
        insecure=config.tls.insecure,
        ucx=config.ucx,
        admits_strangers=bool(config.manager.authority),
        load=config.load.limits(),
    )


def _start_log(config: ServerConfig) -> None:
    """One JSON object a line on the standard error, for log collectors; `emberline cluster logs` makes it readable."""
    handler = logging.StreamHandler()
    handler.setFormatter(_JsonLines(config.name))
    root = logging.getLogger("emberline")
    root.handlers = [handler]
    root.setLevel(config.log_level.upper())
    root.propagate = False
    logging.getLogger("asyncio").setLevel(logging.ERROR)


class _JsonLines(logging.Formatter):
    """A record as one line of JSON."""

    def __init__(self, server: str) -> None:
        super().__init__()
        self._server = server

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S") + f".{int(record.msecs):03d}",
            "level": record.levelname.lower(),
            "server": self._server,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def _tell_systemd(state: str) -> None:
    """The notify protocol: a datagram to the socket that systemd names."""
    path = os.environ.get("NOTIFY_SOCKET")
    if path:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.sendto(state.encode(), "\0" + path[1:] if path.startswith("@") else path)
