"""The stores this process has open: one object per store, however many clients it has.

Which kind a URL means: `ember:///dir` is embedded (this process owns the directory), `ember://host:port` a cluster.
After a fork the child inherits nothing: its clients open their stores anew.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Union

from .errors import InvalidPath, NotFound
from .urls import SCHEME, SUPERBLOCK, cluster_addresses

if TYPE_CHECKING:
    from .client.core import Core
    from .cluster import ClientConfig
    from .embedded import StoreConfig
    from .lane.client import LaneReader
    from .lane.inline import InlineReader
    from .portal import Portal
    from .runtime import AsyncioRuntime

Config = Union["StoreConfig", "ClientConfig"]


class Store(Protocol):
    """What a client has of a store, whatever kind it is."""

    runtime: AsyncioRuntime
    portal: Portal
    forked: bool
    """We are a child of the process that opened it: nothing of it may be touched."""
    closed: bool

    @property
    def lanes(self) -> LaneReader | InlineReader | None:
        """Reads past the loop, where there are any."""

    @property
    def url(self) -> str:
        """What `connect` takes to come here again."""

    @property
    def id(self) -> str:
        """The same for every way to this store, and for no other one."""

    def core(self) -> Core:
        """A new client."""

    async def space(self) -> dict[str, int]:
        """Bytes: `used_bytes` in chunks, `free_bytes` for new data; a cluster has more to say."""

    def shut(self) -> None:
        """Let the calls end and close everything."""

    def forget_after_fork(self) -> None:
        """In the child: become `forked`. The parent goes on as if nothing was."""


def acquire(url: str, config: Config | None, *, creates: bool = True) -> Store:
    """The store of this process at `url` (see `resolve`), opened, or made if `creates`.

    `config` None: the defaults, or those the store is open with already; settings that come too late are warned of.
    Raises StoreBusy, StoreFormat, NotFound, Unavailable.
    """
    with _registry_lock:
        store = _stores.get(url)
        if store is None:
            _tell_log_level()
            store = _stores[url] = _open(url, config, creates)
            _configs[url] = config
            _users[url] = 0
        elif config is not None and config != _configs[url]:
            warnings.warn(f"{url} is open in this process with other settings; they stay", stacklevel=4)
        _users[url] += 1
        return store


def _open(url: str, config: Config | None, creates: bool) -> Store:
    # Here, since either kind imports what a client of its own is.
    from .embedded import EmbeddedStore, StoreConfig

    if cluster_addresses(url):
        if isinstance(config, StoreConfig):
            raise InvalidPath(f"{url} is a cluster; the settings given are those of an embedded store")
        from .cluster import ClientConfig, ClusterStore  # An embedded store needs no network.

        return ClusterStore(url, config or ClientConfig())
    if config is not None and not isinstance(config, StoreConfig):
        raise InvalidPath(f"{url} is an embedded store; the settings given are those of a cluster's client")
    directory = Path(url.removeprefix(SCHEME))
    if not creates and not (directory / SUPERBLOCK).exists():
        raise NotFound("no store here (writing makes one)", str(directory))
    return EmbeddedStore(directory, config or StoreConfig())


def release(store: Store) -> None:
    """One user less; the last one closes the store."""
    with _registry_lock:
        if store.forked:
            return
        _users[store.url] -= 1
        if _users[store.url] == 0:
            del _stores[store.url], _users[store.url], _configs[store.url]
            store.shut()


def resolve(url: str | os.PathLike[str] | None) -> str:
    """The one way to write the URL of a store; None: EMBERLINE_URL. Raises InvalidPath."""
    if url is None:
        url = os.environ.get("EMBERLINE_URL")
        if not url:
            raise InvalidPath(
                "no store given: pass a URL like ember:///path/to/dir or ember://host:port, or set EMBERLINE_URL"
            )
    text = os.fspath(url)
    if not text.startswith(SCHEME):
        raise InvalidPath(f"a store URL looks like ember:///path/to/dir or ember://host:port: {text!r}")
    addresses = cluster_addresses(text)
    if addresses:
        if text.removeprefix(SCHEME).partition("/")[2].lstrip("!").strip("/"):
            raise InvalidPath(f"{text!r} names a path in a store; the store itself is {SCHEME}{','.join(addresses)}")
        return SCHEME + ",".join(addresses)
    return f"{SCHEME}{_directory(text).resolve()}"


def _directory(text: str) -> Path:
    path = text.removeprefix(SCHEME).partition("?")[0]
    path, mark, inner = path.partition("/!")
    if mark and inner.strip("/"):
        raise InvalidPath(f"{text!r} names a path in a store; the store itself is {SCHEME}{path}")
    if "\0" in path or not path:
        raise InvalidPath(f"a store URL names a directory, as in ember:///path/to/dir: {text!r}")
    if not path.startswith(("/", ".", "~")):
        host = path.partition("/")[0]
        raise InvalidPath(
            f"{text!r} names the host {host!r} without a port; a cluster is ember://host:port, an embedded store "
            "ember:///absolute/dir or ember://./relative/dir"
        )
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise InvalidPath(f"{text!r} names a user that does not exist") from error


_stores: dict[str, Store] = {}
_users: dict[str, int] = {}
_configs: dict[str, Config | None] = {}
_registry_lock = threading.Lock()


def _after_fork_in_child() -> None:
    for store in _stores.values():
        store.forget_after_fork()
    for registry in (_stores, _users, _configs):
        registry.clear()
    _registry_lock.release()


def _close_all() -> None:
    for store in list(_stores.values()):
        try:
            store.shut()
        except Exception:
            logging.getLogger("emberline.store").exception("closing %s at exit", store.url)
    _stores.clear()


# Nobody opens or closes a store during a fork, so that the child finds whole ones or none.
os.register_at_fork(
    before=_registry_lock.acquire, after_in_parent=_registry_lock.release, after_in_child=_after_fork_in_child
)
atexit.register(_close_all)


def _tell_log_level() -> None:
    """EMBERLINE_LOG=debug|info|warning|error: how much of our log goes to stderr, if the program says nothing else."""
    level = os.environ.get("EMBERLINE_LOG", "").upper()
    logger = logging.getLogger("emberline")
    if level and not logger.handlers:
        if level not in logging.getLevelNamesMapping():
            raise InvalidPath(f"EMBERLINE_LOG is debug, info, warning or error, not {level.lower()!r}")
        logger.setLevel(level)
        logger.addHandler(logging.StreamHandler())
