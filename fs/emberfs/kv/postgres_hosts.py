"""The servers that a database URL names, and a connection to the one of them that takes writes.

Why not leave the list to the driver? All of it shares one time limit there: a first host that is switched off, and so
answers nothing at all, uses it up, and the second is never asked.

Invariant: no error that is raised here quotes the URL, which may hold a password.
Does not know: what a connection is for.
"""

from __future__ import annotations

from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import asyncpg

from ..errors import InvalidPath, Unavailable

CONNECTION_LOST = (OSError, asyncpg.InterfaceError, asyncpg.InternalClientError, asyncpg.PostgresConnectionError)
NOT_SERVING = (
    asyncpg.AdminShutdownError,
    asyncpg.CannotConnectNowError,
    asyncpg.CrashShutdownError,
    asyncpg.TooManyConnectionsError,
)


class Host(NamedTuple):
    """Where one server is."""

    name: str
    """A name or address, or the directory of a socket; empty: wherever the driver looks."""
    port: int | None

    def __str__(self) -> str:
        return (self.name or "the usual place") + ("" if self.port is None else f":{self.port}")


class Hosts:
    """The servers of one URL. Raises InvalidPath if it cannot be understood."""

    def __init__(self, url: str, *, connect_timeout_s: float) -> None:
        self._url = url
        self._connect_timeout_s = connect_timeout_s
        self._hosts = hosts_of(url)
        self.was_reached = False
        """A server answered once, if only that it does not serve now."""

    def __len__(self) -> int:
        return len(self._hosts)

    async def connect(self, **options: Any) -> Any:
        """Connect to the first that takes writes, beginning with the one that did last. `options` are the driver's.

        Raises Unavailable that says of each server why not, and what the driver raises if a server refuses us.
        """
        reasons: list[str] = []
        for host in list(self._hosts):
            place = {key: value for key, value in (("host", host.name), ("port", host.port)) if value}
            try:
                connection = await asyncpg.connect(
                    self._url,
                    **place,
                    timeout=self._connect_timeout_s,
                    target_session_attrs="read-write",
                    **options,
                )
            except asyncpg.ClientConfigurationError:
                raise
            except (*CONNECTION_LOST, *NOT_SERVING) as error:
                self.was_reached = self.was_reached or not isinstance(error, OSError)
                reasons.append(f"{host}: {str(error) or f'no answer in {self._connect_timeout_s:g} s'}")
                continue
            self.was_reached = True
            self._hosts.remove(host)
            self._hosts.insert(0, host)
            return connection
        raise Unavailable(f"no database server takes writes: {'; '.join(reasons)}")


def hosts_of(url: str) -> list[Host]:
    """The servers that `url` names, at least one. Raises InvalidPath."""
    try:
        parts = urlsplit(url)
        query = parse_qs(parts.query, strict_parsing=True) if parts.query else {}
    except ValueError:  # Its text quotes the URL.
        raise InvalidPath("the database URL cannot be understood") from None
    if url.count("@") > 1 or "@" in url.removeprefix(f"{parts.scheme}://{parts.netloc}"):
        raise InvalidPath("the database URL: in a user or a password write @ as %40, / as %2F, ? as %3F and # as %23")
    ports = [_port(text) for text in query.get("port", [""])[-1].split(",")]
    named = parts.netloc.rpartition("@")[2] or query.get("host", [""])[-1]
    texts = named.split(",")
    if len(ports) not in (1, len(texts)):
        raise InvalidPath(f"the database URL has {len(ports)} ports for {len(texts)} hosts")
    ports *= len(texts) // len(ports)
    return [_host(text, port) for text, port in zip(texts, ports, strict=True)]


def _host(text: str, port: int | None) -> Host:
    """From `name`, `name:port`, `[address]:port` or `/directory`."""
    if text.startswith("/"):
        return Host(text, port)
    if text.startswith("["):
        name, _, rest = text[1:].partition("]")
        return Host(name, _port(rest.removeprefix(":")) or port)
    name, _, rest = text.partition(":")
    return Host(unquote(name), _port(rest) or port)


def _port(text: str) -> int | None:
    if text and not (text.isascii() and text.isdigit()):
        raise InvalidPath("a port in the database URL is not a number; is there a / or # in a password? Write %2F, %23")
    return int(text) if text else None
