"""The client: `sync` and `aio` are the doors, `core` does the work, `handle` has the files."""

from .aio import AsyncClient
from .handle import AsyncFile, File
from .sync import Client

__all__ = ["AsyncClient", "AsyncFile", "Client", "File"]
