"""Bringing the lost KV of a cluster back from a metadata dump: into the directory of a kv server that does not run.

Names and chains come back as they were dumped. Ids of files begin far behind those of the dump: what was written since
has no name, and no new file must come under its id.

Does not know: what has become of the storage nodes since (docs/operations.md).
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterable
from pathlib import Path

import msgspec

from ..errors import AlreadyExists, StoreBusy, StoreFormat
from ..kv import LmdbKV
from ..kv.types import KV, Transaction
from ..manager.tables import Tables, write_tables
from ..meta.dump import load, parse_header
from ..meta.keys import IDS_KEY, IdLease, encode_row, get_ids
from ..portal import Portal
from ..runtime import AsyncioRuntime
from ..sharing.ownership import Ownership, read_owner

ID_STEP = 1 << 32
"""Ids that may have been given out since the dump. There are 2^64."""


def restore_kv(directory: Path, lines: Iterable[str]) -> None:
    """Load a cluster's dump into `directory`, which is made, or empty of rows.

    Raises StoreBusy (the kv server runs), AlreadyExists (it has rows), StoreFormat (no dump, or none of a cluster).
    """
    directory.mkdir(parents=True, exist_ok=True)
    ownership = Ownership.take(directory)
    if ownership is None:
        owner = read_owner(directory)
        pid = owner.pid if owner is not None else None
        raise StoreBusy(f"process {pid} has this directory open; stop the kv server first", str(directory), pid=pid)
    try:
        if (directory / "data.mdb").exists():
            raise AlreadyExists("there are rows already: move data.mdb and lock.mdb away, then load", str(directory))
        new = directory / "load.new"
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        _fill(new, lines)
        # Whole now: a load that failed leaves the directory as it was.
        (new / "data.mdb").rename(directory / "data.mdb")
        shutil.rmtree(new)
    finally:
        ownership.close()


def _fill(directory: Path, lines: Iterable[str]) -> None:
    runtime = AsyncioRuntime("emberfs-load")
    portal = Portal(runtime)
    try:
        kv = LmdbKV.open(directory, runtime)
        try:
            portal.run(restore(kv, lines))
        finally:
            portal.run(kv.close())
    finally:
        runtime.stop()


async def restore(kv: KV, lines: Iterable[str]) -> None:
    """Load a cluster's dump into an empty KV. Raises as `restore_kv` does."""
    source = iter(lines)
    first = next(source, "")
    cluster = parse_header(first).cluster
    if isinstance(cluster, msgspec.UnsetType):
        raise StoreFormat("a dump of an embedded store: it does not say where the chunks of a cluster are")
    try:
        tables = msgspec.json.decode(cluster, type=Tables)
    except msgspec.DecodeError as error:
        raise StoreFormat(f"the tables of the cluster in the dump are damaged: {error}") from None
    await load(kv, itertools.chain([first], source))
    await kv.run(_skip_ids)
    await write_tables(kv, tables)


async def _skip_ids(txn: Transaction) -> None:
    begin = (await get_ids(txn)).next + ID_STEP
    txn.put(IDS_KEY, encode_row(IdLease(next=begin, swept=begin)))
