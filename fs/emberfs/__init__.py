"""emberfs: a chunked, checksummed store for datasets, checkpoints and KV caches.

    with emberfs.connect("ember:///tmp/store") as store:
        store.put("/hello.txt", b"hello")

The map of the package is `fs/README.md`.
"""

from .client import AsyncClient, AsyncFile, Client, File
from .connect import connect, connect_async
from .embedded import StoreConfig
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
from .types import Inode, Kind

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
