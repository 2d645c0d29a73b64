"""emberfs: a chunked, checksummed store for datasets, checkpoints and KV caches.

    with emberfs.connect("ember:///tmp/store") as store:
        store.put("/hello.txt", b"hello")

The map of the package is `fs/README.md`.
"""

from typing import TYPE_CHECKING

from .errors import (
    AlreadyExists,
    Conflict,
    Corruption,
    DirectoryNotEmpty,
    EmberError,
    InvalidPath,
    IsADirectory,
    LimitExceeded,
    NoSpace,
    NotADirectory,
    NotFound,
    StaleChunk,
    StoreBusy,
    StoreClosed,
    StoreFormat,
    TargetFailed,
    UpdateUnknown,
)
from .lazy import importing
from .types import Inode, Kind

if TYPE_CHECKING:
    from .client import AsyncClient, AsyncFile, Client, File
    from .embedded import StoreConfig
    from .opening import connect, connect_async

__all__ = [
    "AlreadyExists",
    "AsyncClient",
    "AsyncFile",
    "Client",
    "Conflict",
    "Corruption",
    "DirectoryNotEmpty",
    "EmberError",
    "File",
    "Inode",
    "InvalidPath",
    "IsADirectory",
    "Kind",
    "LimitExceeded",
    "NoSpace",
    "NotADirectory",
    "NotFound",
    "StaleChunk",
    "StoreBusy",
    "StoreClosed",
    "StoreConfig",
    "StoreFormat",
    "TargetFailed",
    "UpdateUnknown",
    "connect",
    "connect_async",
]

__dir__ = __all__.copy
__getattr__ = importing(
    __name__,
    {"client": "AsyncClient AsyncFile Client File", "embedded": "StoreConfig", "opening": "connect connect_async"},
)
