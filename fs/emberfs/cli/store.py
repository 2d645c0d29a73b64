"""From a command's STORE argument to an open store.

A command that only looks never makes a store: a mistyped URL is an error, not an empty store.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..client.sync import Client
from ..errors import NotFound
from ..stores import resolve
from ..urls import SCHEME, SUPERBLOCK, cluster_addresses, split_url
from .location import STORE_VARIABLE, is_missing, store_url

if TYPE_CHECKING:
    from ..cluster.maintenance import ClusterMaintenance

CLUSTER_VARIABLE = "EMBERLINE_CLUSTER"

_Command = TypeVar("_Command", bound=Callable[..., Any])


def store_argument(function: _Command) -> _Command:
    """The argument STORE, and what the help says of it."""
    text = inspect.cleandoc(function.__doc__ or "")
    function.__doc__ = f"{text}\n\nSTORE is a URL like ember:///store/dir; without it, the one of {STORE_VARIABLE}."
    return click.argument("store", required=False)(function)


def url_of(url: str | None) -> str:
    """The store that `url`, or EMBERLINE_URL, names; a path inside the store is cut off."""
    url = url or store_url()
    if not url.startswith(SCHEME):
        raise click.UsageError(
            f"not the URL of a store: {url!r}; it looks like ember:///store/dir (or set {STORE_VARIABLE})"
        )
    return resolve(split_url(url)[0] or url)


def directory_of(url: str | None) -> Path:
    """The directory of the embedded store that `url`, or EMBERLINE_URL, names; a usage error for a cluster."""
    store = url_of(url)
    if cluster_addresses(store):
        raise click.UsageError(f"{store} is a cluster; this is for embedded stores, like ember:///store/dir")
    return Path(store.removeprefix(SCHEME))


def require_store(directory: Path) -> None:
    """Raises NotFound if there is no store at `directory`."""
    if not (directory / SUPERBLOCK).exists():
        raise NotFound("no store here (cp, put, sync and mkdir make one)", str(directory))


@contextmanager
def open_store(url: str | None) -> Iterator[Client]:
    """A client of an existing store, closed at the end. Raises NotFound, StoreBusy, StoreFormat, Unavailable."""
    store = url_of(url)
    if is_missing(store):
        require_store(Path(store.removeprefix(SCHEME)))
    with Client(store) as client:
        yield client


@contextmanager
def open_cluster(url: str) -> Iterator[ClusterMaintenance]:
    """Upkeep of the cluster at `url`, as an admin of it if this user has the credentials. Raises Unavailable."""
    from ..cluster import ClientConfig, ClusterStore
    from ..cluster.maintenance import ClusterMaintenance

    # Not the store that this process may have open already: that one is a client's.
    store = ClusterStore(url, ClientConfig(credentials=_admin_credentials(url)))
    try:
        yield ClusterMaintenance(store)
    finally:
        store.shut()


def _admin_credentials(url: str) -> str:
    """Those that `cluster up` left in EMBERLINE_CLUSTER, if that is this cluster; "": whatever a client would take."""
    from ..cluster.local import LocalCluster

    directory = os.environ.get(CLUSTER_VARIABLE, "")
    if directory and not os.environ.get("EMBERLINE_CREDENTIALS"):
        local = LocalCluster(Path(directory))
        if local.exists and set(cluster_addresses(local.url)) & set(cluster_addresses(url)):
            return str(local.directory / "admin")
    return ""
