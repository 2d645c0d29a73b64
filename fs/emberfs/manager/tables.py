"""The cluster manager's tables in a metadata backup: without them the names lead to no chunk.

A chain, and the configuration, is brought back as it was dumped, under a version that no server has seen: so nothing
that is left of the time after the dump is taken for newer.

Does not know: who reads or writes the backup, and whether a target still has what its chain says (docs/operations.md).
"""

from __future__ import annotations

import msgspec
from msgspec.structs import replace

from ..errors import AlreadyExists, Conflict
from ..kv.types import KV, Transaction
from ..routing import Chain, Target
from . import rows

RESTORE_STEP = 1 << 20
"""Versions go up by this with a restore. A chain changes when a server comes or goes: never so often since the dump."""
READS_MAX = 10


class Tables(msgspec.Struct):
    """All that has to be there again: not who was primary, nor whose session was live."""

    routing_version: int
    sessions_version: int
    setup: rows.Setup | None
    nodes: list[rows.NodeRow]
    targets: list[Target]
    chains: list[Chain]
    config: rows.ConfigRow | None = None
    """None: nothing was ever set, or the dump is older than this field."""


async def read_tables(kv: KV) -> Tables:
    """The tables as they were at one moment, though `kv` may know no moments. Raises Conflict."""
    for _ in range(READS_MAX):
        before = await rows.get_format(kv.begin())
        tables = Tables(
            before.routing_version,
            before.sessions_version,
            await rows.get(kv.begin(), rows.SETUP_KEY, rows.Setup),
            list((await rows.get_all(kv.begin(), rows.NODES, rows.NodeRow)).values()),
            list((await rows.get_all(kv.begin(), rows.TARGETS, Target)).values()),
            list((await rows.get_all(kv.begin(), rows.CHAINS, Chain)).values()),
            await rows.get(kv.begin(), rows.CONFIG_KEY, rows.ConfigRow),
        )
        if (await rows.get_format(kv.begin())).routing_version == before.routing_version:
            return tables
    raise Conflict("the chains change all the time: dump again when they are at rest")


async def write_tables(kv: KV, tables: Tables) -> None:
    """The reverse, into a KV without tables. No manager may be running on it. Raises AlreadyExists."""

    async def work(txn: Transaction) -> None:
        if await txn.range(rows.PREFIX, rows.PREFIX + b"\xff", limit=1):
            raise AlreadyExists("there are tables of a cluster already: load into the directory of a new kv server")
        versions = rows.Format(
            routing_version=tables.routing_version + RESTORE_STEP,
            sessions_version=tables.sessions_version + RESTORE_STEP,
        )
        txn.put(rows.FORMAT_KEY, rows.encode(versions))
        if tables.setup is not None:
            txn.put(rows.SETUP_KEY, rows.encode(tables.setup))
        config = tables.config or rows.ConfigRow()
        txn.put(rows.CONFIG_KEY, rows.encode(replace(config, version=config.version + RESTORE_STEP)))
        for node in tables.nodes:
            txn.put(rows.NODES + node.node.name.encode(), rows.encode(node))
        for target in tables.targets:
            txn.put(rows.TARGETS + target.id, rows.encode(target))
        for chain in tables.chains:
            # A chain that had not begun begins with the first reports.
            version = chain.version + RESTORE_STEP if chain.version else 0
            txn.put(rows.chain_key(chain.id), rows.encode(replace(chain, version=version)))

    await kv.run(work)
