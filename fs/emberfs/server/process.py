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
import threading
from collections.abc import Callable
from pathlib import Path

from prometheus_client import CollectorRegistry

from ..errors import EmberError
from ..portal import Portal
from ..runtime import AsyncioRuntime
from ..transport import TcpConfig, TcpNetwork, TlsFiles
from .config import ServerConfig
from .metrics import Metered, serve_metrics
from .roles import open_role

LOOK_S = 1.0
"""How often it is looked whether the role has to end."""

log = logging.getLogger("emberline.server")


def run_server(config: ServerConfig) -> None:
    """Serve until told to stop. Raises what opening the role raises."""
    _start_log(config)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    signal.signal(signal.SIGHUP, lambda *_: None)
    runtime = AsyncioRuntime(config.name)
    portal = Portal(runtime)
    registry = CollectorRegistry()
    network = TcpNetwork(runtime, tcp_config(config))
    end_metrics: Callable[[], None] | None = None
    try:
        role = portal.run(open_role(config, runtime, network))
        listener = portal.run(network.serve(config.listen, Metered(role.service, runtime, registry)))
        portal.run(role.start())
        if config.metrics:
            end_metrics = serve_metrics(registry, role.gauges, config.metrics)
        log.info("%s %s serves at %s", config.role, config.name, listener.address)
        sys.stdout.write(json.dumps({"ready": True, "address": listener.address, "pid": os.getpid()}) + "\n")
        sys.stdout.flush()
        _tell_systemd("READY=1")
        while not stop.wait(LOOK_S):
            if reason := role.must_stop():
                log.error("stopping: %s", reason)
                break
        log.info("stopping: calls in the air have %.0f s", config.drain_s)
        _tell_systemd("STOPPING=1")
        portal.run(role.retire())
        portal.run(listener.close(drain_s=config.drain_s))
        portal.run(role.close())
    finally:
        if end_metrics is not None:
            end_metrics()
        try:
            portal.run(network.close())
        except EmberError:
            log.exception("closing the network")
        runtime.stop()


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
        admits_strangers=bool(config.manager.authority),
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
