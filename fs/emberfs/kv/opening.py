"""From the URL of an ordered KV to the engine."""

from __future__ import annotations

from pathlib import Path

from ..errors import InvalidPath
from ..runtime import Runtime
from ..transport.types import Network
from .lmdb import LmdbKV
from .remote import RemoteKV
from .types import KV


async def open_kv(url: str, runtime: Runtime, *, network: Network | None = None) -> KV:
    """Open the KV that `url` names:

        kv://host:port                       the server of a cluster, by `network`
        postgresql://user@host,host/name     a database; needs the extra `postgres`
        /a/directory                         an environment of this process, made if there is none

    Raises InvalidPath, and what opening the engine raises.
    """
    scheme, separator, address = url.partition("://")
    if not separator:
        return LmdbKV.open(Path(url), runtime)
    if scheme == "kv" and network is not None:
        return RemoteKV(network.connection(address), runtime)
    if scheme in ("postgresql", "postgres"):
        try:
            from .postgres import PostgresKV
        except ModuleNotFoundError as error:
            raise InvalidPath("PostgreSQL needs a driver: pip install 'emberline[postgres]'") from error
        return await PostgresKV.open(url, runtime)
    raise InvalidPath(f"not a key-value store: {scheme}://… (a directory, postgresql://… or kv://host:port)")
