"""Where a service is: `host:port`, `[v6]:port` or `unix:/path`."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from ..errors import EmberError, InvalidPath

UNIX = "unix:"


class Address(NamedTuple):
    """One of the two: a host and its port, or the path of a socket."""

    host: str = ""
    port: int = 0
    path: str = ""

    def __str__(self) -> str:
        if self.path:
            return UNIX + self.path.replace("\0", "@")
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: str) -> Address:
    """Raises InvalidPath."""
    if text.startswith(UNIX):
        path = text.removeprefix(UNIX)
        if path.startswith("@"):  # In the abstract namespace, where there are no files.
            return Address(path="\0" + path[1:])
        if not path.startswith("/"):
            raise InvalidPath(f"the path of a socket is absolute: unix:/path, not {text!r}")
        return Address(path=path)
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not (host and colon and port.isascii() and port.isdigit() and int(port) < 1 << 16):
        raise InvalidPath(f"an address is host:port, [v6]:port or unix:/path, not {text!r}")
    return Address(host, int(port))


def is_loopback(host: str) -> bool:
    """True for a numeric address that no other machine can reach."""
    return ipaddress.ip_address(host.partition("%")[0]).is_loopback


@contextmanager
def named(address: str) -> Iterator[None]:
    """Errors of the operating system say which address they are about, unless it is a file (of TLS)."""
    try:
        yield
    except EmberError:
        raise
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, address) from error
