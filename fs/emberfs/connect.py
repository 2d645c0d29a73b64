"""`connect`: from a URL to a client."""

from __future__ import annotations

from typing import Any

from .client import AsyncClient, Client
from .embedded import StoreConfig


def connect(url: str | None = None, **settings: Any) -> Client:
    """Open the store at `url` (made if it is not there), or at EMBERLINE_URL.

    `ember:///path/to/dir` is an embedded store: everything in this process, no service to start. `settings` are the
    fields of `StoreConfig`. Raises StoreBusy when another process owns it, StoreFormat, InvalidPath.
    """
    return Client(url, StoreConfig(**settings) if settings else None)


def connect_async(url: str | None = None, **settings: Any) -> AsyncClient:
    """`connect` for programs with an event loop. Opening itself is quick and blocks; every later call is awaited."""
    return AsyncClient(url, StoreConfig(**settings) if settings else None)
