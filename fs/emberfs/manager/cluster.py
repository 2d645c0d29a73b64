"""The cluster's tables: in memory as the primary serves them, in the KV as they stand.

Invariants:
  - One change at a time: it is planned on the tables in memory, committed under the lease row, then applied to memory
    and published. Nothing waits between the plan and its commit, so a plan never acts on old tables.
  - The caller of a change may be cancelled; the change is not.
  - While a change that takes a node for dead is under way the node is *condemned*: its heartbeat must not be answered
    before that change is published, or it would serve under the old chain version with a new lease.
  - A change of nodes, targets or chains raises the routing version; one of sessions the sessions version; the
    configuration has its version in its row.

Does not know: why things change.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec
from msgspec.structs import replace

from ..errors import StaleRouting
from ..kv.types import KV, Transaction
from ..routing import Chain, Routing, Target
from ..runtime import Runtime
from ..settings import SETTINGS, Config, Settings
from ..waiting import pause
from . import rows
from .election import NEVER_S, Election
from .rows import ConfigRow, Format, NodeRow, SessionRow, Setup

K = TypeVar("K")
R = TypeVar("R")


@dataclass(kw_only=True, slots=True)
class Change:
    """New rows, None: the row goes."""

    nodes: dict[str, NodeRow | None] = field(default_factory=dict)
    targets: dict[bytes, Target | None] = field(default_factory=dict)
    chains: dict[int, Chain] = field(default_factory=dict)
    sessions: dict[bytes, SessionRow | None] = field(default_factory=dict)
    setup: Setup | None = None
    config: ConfigRow | None = None
    takes_for_dead: frozenset[str] = frozenset()
    """Nodes whose lease must be over for this change to be right."""

    @property
    def is_routing(self) -> bool:
        return bool(self.nodes or self.targets or self.chains)


Plan = Callable[[], Change | None]
"""Looks at the tables and says what to change. What it raises, the caller gets."""


class Cluster:
    """The tables. `load` when this manager becomes primary, `start` before the first change, `close` after the last."""

    def __init__(self, kv: KV, runtime: Runtime, election: Election) -> None:
        self.nodes: dict[str, NodeRow] = {}
        self.targets: dict[bytes, Target] = {}
        self.chains: dict[int, Chain] = {}
        self.sessions: dict[bytes, SessionRow] = {}
        self.setup: Setup | None = None
        self.config_row = ConfigRow()
        self.settings = Settings()
        self.config = Config()
        """`config_row` and `settings`, as they are published."""
        self.configured_s = NEVER_S
        """When this manager changed the configuration last."""
        self.routing = Routing(0)
        self.condemned: frozenset[str] = frozenset()
        self._format = Format()
        self._kv = kv
        self._runtime = runtime
        self._election = election
        self._queue: deque[tuple[Plan, asyncio.Future[None]]] = deque()
        self._work: asyncio.Future[None] | None = None
        self._news: list[asyncio.Future[None]] = []
        self._writer: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._writer = self._runtime.spawn(self._write(), "manager-changes")

    async def close(self) -> None:
        if self._writer is not None:
            self._writer.cancel()
            try:
                await self._writer
            except asyncio.CancelledError:
                pass
        for _, done in self._queue:
            if not done.done():
                done.set_exception(StaleRouting("this manager is closing"))
        self._queue.clear()
        self.wake()

    @property
    def sessions_version(self) -> int:
        return self._format.sessions_version

    def chains_of(self, node: str) -> list[Chain]:
        """The chains that have a target on `node`."""
        return [self.chains[target.chain] for target in self.targets.values() if target.node == node]

    async def load(self) -> None:
        """Take over what the rows say."""
        txn = self._kv.begin()
        self._format = await rows.get_format(txn)
        nodes = await rows.get_all(txn, rows.NODES, NodeRow)
        targets = await rows.get_all(txn, rows.TARGETS, Target)
        chains = await rows.get_all(txn, rows.CHAINS, Chain)
        self.sessions = await rows.get_all(txn, rows.SESSIONS, SessionRow)
        self.setup = await rows.get(txn, rows.SETUP_KEY, Setup)
        self._configure(await rows.get(txn, rows.CONFIG_KEY, ConfigRow) or ConfigRow())
        self.nodes = {row.node.name: row for row in nodes.values()}
        self.targets = targets
        self.chains = {chain.id: chain for chain in chains.values()}
        self._publish()

    async def change(self, plan: Plan) -> None:
        """Carry `plan` out and return when it is durable and published. Raises StaleRouting if we are not primary."""
        done = self._runtime.future()
        self._queue.append((plan, done))
        if self._work is not None and not self._work.done():
            self._work.set_result(None)
        await done

    async def news(self, wait_s: float) -> None:
        """Return when a newer routing is published, `wake` was called, or after `wait_s`."""
        future = self._runtime.future()
        self._news.append(future)
        try:
            await pause(self._runtime, wait_s, future)
        finally:
            self._news = [each for each in self._news if each is not future]

    def wake(self) -> None:
        """Let all who wait for news look again."""
        for future in self._news:
            if not future.done():
                future.set_result(None)

    async def _write(self) -> None:
        while True:
            while not self._queue:
                self._work = self._runtime.future()
                await self._work
            plan, done = self._queue.popleft()
            try:
                self._election.require_primary()
                change = plan()
                if change is not None:
                    self.condemned = change.takes_for_dead
                    await self._commit(change)
            except Exception as error:
                if not done.cancelled():
                    done.set_exception(error)
            except BaseException:
                done.cancel()
                raise
            else:
                if not done.done():
                    done.set_result(None)
            finally:
                self.condemned = frozenset()

    async def _commit(self, change: Change) -> None:
        new = replace(
            self._format,
            routing_version=self._format.routing_version + change.is_routing,
            sessions_version=self._format.sessions_version + bool(change.sessions),
        )

        async def work(txn: Transaction) -> None:
            txn.put(rows.FORMAT_KEY, rows.encode(new))
            if change.setup is not None:
                txn.put(rows.SETUP_KEY, rows.encode(change.setup))
            if change.config is not None:
                txn.put(rows.CONFIG_KEY, rows.encode(change.config))
            _put(txn, ((rows.NODES + name.encode(), row) for name, row in change.nodes.items()))
            _put(txn, ((rows.TARGETS + target, row) for target, row in change.targets.items()))
            _put(txn, ((rows.chain_key(chain), row) for chain, row in change.chains.items()))
            _put(txn, ((rows.SESSIONS + client, row) for client, row in change.sessions.items()))

        await self._election.run(work)
        self._format = new
        self.setup = change.setup or self.setup
        if change.config is not None:
            self._configure(change.config)
            self.configured_s = self._runtime.now_s()
        _apply(self.nodes, change.nodes)
        _apply(self.targets, change.targets)
        _apply(self.chains, change.chains)
        _apply(self.sessions, change.sessions)
        if change.is_routing:
            self._publish()

    def _configure(self, row: ConfigRow) -> None:
        self.config_row, self.settings = row, Settings.of(row.values)
        chosen = tuple(sorted(name for name in row.values if name in SETTINGS))
        self.config = Config(row.version, self.settings.values(), chosen, row.waits_s)

    def _publish(self) -> None:
        self.routing = Routing(
            self._format.routing_version,
            tuple(self.nodes[name].node for name in sorted(self.nodes)),
            tuple(self.targets[target] for target in sorted(self.targets)),
            tuple(self.chains[chain] for chain in sorted(self.chains)),
        )
        self.wake()


def _put(txn: Transaction, changed: Iterable[tuple[bytes, msgspec.Struct | None]]) -> None:
    for key, row in changed:
        if row is None:
            txn.delete(key)
        else:
            txn.put(key, rows.encode(row))


def _apply(table: dict[K, R], changed: Mapping[K, R | None]) -> None:
    for key, row in changed.items():
        if row is None:
            table.pop(key, None)
        else:
            table[key] = row
