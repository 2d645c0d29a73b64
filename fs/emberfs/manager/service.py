"""The cluster manager: who is alive, who holds what, which clients there are. Start here.

Several may run on one KV; the one that `election` makes primary serves, the others answer `StaleRouting` with its
address. Heartbeats go to memory (`members`) and are answered at once; a tick looks what they mean for the chains
(`states`), for sessions and for moves, and changes the tables (`cluster`) by transactions.

Replies: HeartbeatReply, RoutingReply and StatusReply of what they are named for, ConfigReply of GetConfig and
SetConfig, Done of the rest.
Does not know: chunks, files, which transport brought a request.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterable, Sequence
from typing import Any

from msgspec.structs import replace

from .. import messages
from ..errors import AlreadyExists, Conflict, EmberError, NotFound, ProtocolError
from ..kv.types import KV
from ..messages import (
    ConfigReply,
    Done,
    Heartbeat,
    HeartbeatReply,
    Message,
    NodeStatus,
    RoutingReply,
    StatusReply,
    TargetReport,
)
from ..routing import Chain, ChainTarget, LocalState, Role, Target, TargetState
from ..runtime import Runtime
from .admission import admit
from .chains import Place, check_drain, disks_for
from .cluster import Change, Cluster, Plan
from .config import ManagerConfig
from .election import Election
from .members import Members
from .moves import Layout, Move, plan_moves
from .placement import place
from .rows import NodeRow, Setup
from .sessions import Sessions
from .settings import after_request, after_wait
from .states import accept_loss, next_chain

TARGET_ID_BYTES = 16

log = logging.getLogger("emberline.manager")


class ManagerService:
    """One manager. `start` before the first request, `close` after the last; the KV is the caller's to close."""

    def __init__(
        self,
        kv: KV,
        runtime: Runtime,
        *,
        address: str,
        place: Place = place,
        config: ManagerConfig | None = None,
    ) -> None:
        """`address`: where others reach this manager."""
        self._runtime = runtime
        self._address = address
        self._place = place
        self._config = config or ManagerConfig()
        self._election = Election(kv, runtime, address=address, elected=self._begin, config=self._config)
        self._cluster = Cluster(kv, runtime, self._election)
        self._members = Members(wait_s=lambda: self._cluster.config.waits_s)
        self._sessions = Sessions(self._cluster)
        self._unsettled: set[int] = set()
        """Chains whose next step may be a change."""
        self._dead: frozenset[str] = frozenset()
        self._moves_planned_for: object = None
        self._ticker: asyncio.Task[None] | None = None
        self._mistake = ""
        """The last exception that nobody meant to raise in a tick; said once in the log."""
        self._handlers: dict[type[Message], Callable[[Any], Coroutine[Any, Any, Message]]] = {
            messages.Heartbeat: self._heartbeat,
            messages.GetRouting: self._get_routing,
            messages.OpenSession: self._open_session,
            messages.ExtendSession: self._extend_session,
            messages.CloseClient: self._close_client,
            messages.SetupChains: self._setup_chains,
            messages.AddNode: self._add_node,
            messages.DrainNode: self._drain_node,
            messages.RemoveNode: self._remove_node,
            messages.AcceptLoss: self._accept_loss,
            messages.GetConfig: self._get_config,
            messages.SetConfig: self._set_config,
            messages.ClusterStatus: self._status,
        }

    async def start(self) -> None:
        """Stand for election. Requests are taken at once; they are refused until this manager is primary."""
        self._cluster.start()
        self._election.start()
        self._ticker = self._runtime.spawn(self._tick_for_ever(), "manager-ticks")

    async def close(self) -> None:
        """Stop; if this one was primary another may begin at once."""
        if self._ticker is not None:
            self._ticker.cancel()
            try:
                await self._ticker
            except asyncio.CancelledError:
                pass
        await self._cluster.close()
        await self._election.close()
        self._cluster.wake()

    @property
    def tasks(self) -> list[asyncio.Task[None]]:
        """What goes on until `close`."""
        return self._election.tasks + ([] if self._ticker is None else [self._ticker])

    @property
    def is_primary(self) -> bool:
        """True while this manager is the one that serves."""
        return self._election.is_primary

    def gauges(self) -> dict[str, float]:
        """For the metrics page, from any thread. Only the primary knows the cluster."""
        if not self.is_primary:
            return {"manager_is_primary": 0}
        routing = self._cluster.routing
        lost = sum(chain.is_lost for chain in routing.chains)
        return {
            "manager_is_primary": 1,
            "chains_total": len(routing.chains),
            "chains_degraded": sum(chain.is_short for chain in routing.chains),
            "chains_down": sum(not chain.serving for chain in routing.chains) - lost,
            "chains_lost": lost,
            "nodes_dead": len(self._dead_of(node.name for node in routing.nodes)),
            "client_sessions": len(self._cluster.sessions),
            "routing_version": routing.version,
        }

    def handle(self, request: Message, buffers: Sequence[memoryview] = (), /) -> Awaitable[Message]:
        """Serve one request. Raises StaleRouting, which names the primary, unless this manager is it."""
        handler = self._handlers.get(type(request))
        if handler is None:
            raise ProtocolError(f"a cluster manager does not serve {type(request).__name__}")
        self._election.require_primary()
        return handler(request)

    # ---- nodes

    async def _heartbeat(self, request: Heartbeat) -> HeartbeatReply:
        node = request.node
        while True:
            if node.name in self._cluster.condemned:
                await self._cluster.change(_nothing)  # Behind the change that takes it for dead.
            elif self._admit(request) is not None:
                await self._cluster.change(lambda: self._admit(request))
                self._unsettle([node.name])
            else:
                break
        self._election.require_primary()
        # From here to the reply nothing waits: the lease that it gives is under the routing that it carries, and of the
        # length that is waited for.
        is_news = self._members.hear(node.name, request.reports, now_s=self._runtime.now_s())
        if is_news or node.name in self._dead:
            self._unsettle([node.name])
        cluster = self._cluster
        routing = None if request.routing_version == cluster.routing.version else cluster.routing
        sessions = None if request.sessions_version == cluster.sessions_version else list(cluster.sessions)
        config = None if request.config_version == cluster.config.version else cluster.config
        return HeartbeatReply(routing, cluster.sessions_version, sessions, cluster.settings.lease_s, config)

    def _admit(self, request: Heartbeat) -> Change | None:
        """A plan: make the sender known, if it is not."""
        now_s, since_s = self._runtime.now_s(), self._election.since_s
        is_over = self._members.is_dead(request.node.name, now_s=now_s, since_s=since_s)
        return admit(self._cluster, request, lease_is_over=is_over)

    async def _add_node(self, request: messages.AddNode) -> Done:
        def plan() -> Change | None:
            row = self._storage_node(request.node)
            return _node_change(replace(row, node=replace(row.node, draining=False), member=True, joining=True))

        await self._cluster.change(plan)
        return Done()

    async def _drain_node(self, request: messages.DrainNode) -> Done:
        def plan() -> Change | None:
            row = self._storage_node(request.node)
            setup = self._cluster.setup
            if setup is not None and self._cluster.chains_of(request.node):
                left = [other.node for other in self._cluster.nodes.values() if other.member and other != row]
                check_drain([node for node in left if not node.draining], setup.replicas, same_host=setup.same_host)
            return _node_change(replace(row, node=replace(row.node, draining=True), joining=False))

        await self._cluster.change(plan)
        return Done()

    async def _remove_node(self, request: messages.RemoveNode) -> Done:
        def plan() -> Change | None:
            if request.node not in self._cluster.nodes:
                raise NotFound(f"there is no node {request.node}")
            held = len(self._cluster.chains_of(request.node))
            if held:
                raise Conflict(f"node {request.node} still holds {held} targets: drain it first")
            if request.node not in self._dead_nodes():
                raise Conflict(f"node {request.node} is running: stop it first")
            return Change(nodes={request.node: None})

        await self._cluster.change(plan)
        self._members.forget(request.node)
        return Done()

    def _storage_node(self, name: str) -> NodeRow:
        row = self._cluster.nodes.get(name)
        if row is None or row.node.role != Role.STORAGE:
            raise NotFound(f"there is no storage node {name}")
        return row

    def _dead_nodes(self) -> frozenset[str]:
        return self._dead_of(self._cluster.nodes)

    def _dead_of(self, nodes: Iterable[str]) -> frozenset[str]:
        return self._members.dead(nodes, now_s=self._runtime.now_s(), since_s=self._election.since_s)

    # ---- routing and sessions

    async def _get_routing(self, request: messages.GetRouting) -> RoutingReply:
        if self._cluster.routing.version <= request.version and request.wait_s > 0:
            await self._cluster.news(min(request.wait_s, self._config.wait_s_max))
            self._election.require_primary()
        routing = self._cluster.routing
        return RoutingReply(routing if routing.version > request.version else None)

    async def _open_session(self, request: messages.OpenSession) -> Done:
        await self._sessions.open(request, now_s=self._runtime.now_s())
        return Done()

    async def _extend_session(self, request: messages.ExtendSession) -> Done:
        self._sessions.extend(request, now_s=self._runtime.now_s())
        return Done()

    async def _close_client(self, request: messages.CloseClient) -> Done:
        await self._sessions.close(request)
        return Done()

    # ---- chains

    async def _setup_chains(self, request: messages.SetupChains) -> Done:
        wanted = (request.replicas, request.targets_per_disk)
        if self._is_set_up(*wanted):
            return Done()
        dead = self._dead_nodes()
        nodes = [row.node for name, row in self._cluster.nodes.items() if name not in dead]
        disks, same_host = disks_for([node for node in nodes if node.role == Role.STORAGE], *wanted)
        # Of a large cluster this takes seconds, in which the lease must be renewed.
        groups = await self._runtime.offload(self._place, disks, *wanted)

        def plan() -> Change | None:
            if self._is_set_up(*wanted):
                return None
            rows = [self._storage_node(disk.node) for disk in disks]
            change = Change(
                nodes={row.node.name: replace(row, member=True) for row in rows}, setup=Setup(*wanted, same_host)
            )
            for chain, group in enumerate(groups, 1):
                assert len({disk.host for disk in group}) == request.replicas
                targets = [self._new_target(change, chain, disk.node) for disk in group]
                change.chains[chain] = Chain(chain, 0, tuple(targets), request.replicas)
            return change

        await self._cluster.change(plan)
        self._unsettled.update(self._cluster.chains)
        return Done()

    def _is_set_up(self, replicas: int, targets_per_disk: int) -> bool:
        """True if the chain table was made just so. Raises AlreadyExists if it was made otherwise."""
        old = self._cluster.setup
        if old is not None and (old.replicas, old.targets_per_disk) != (replicas, targets_per_disk):
            raise AlreadyExists(
                f"the chain table was made already: {old.replicas} replicas, {old.targets_per_disk} targets a disk"
            )
        return old is not None

    async def _accept_loss(self, request: messages.AcceptLoss) -> Done:
        def plan() -> Change | None:
            chain = self._cluster.chains.get(request.chain)
            if chain is None:
                raise NotFound(f"there is no chain {request.chain}")
            target = self._cluster.targets.get(request.target)
            heard = {} if target is None or target.node in self._dead_nodes() else self._members.reports(target.node)
            return Change(chains={chain.id: accept_loss(chain, request.target, heard.get(request.target))})

        await self._cluster.change(plan)
        self._unsettled.add(request.chain)
        return Done()

    async def _get_config(self, _: messages.GetConfig) -> ConfigReply:
        return ConfigReply(self._cluster.config)

    async def _set_config(self, request: messages.SetConfig) -> ConfigReply:
        def plan() -> Change | None:
            row = after_request(self._cluster.config_row, request)
            return None if row is None else Change(config=row)

        await self._cluster.change(plan)
        return ConfigReply(self._cluster.config)

    async def _status(self, _: messages.ClusterStatus) -> StatusReply:
        now_s, dead = self._runtime.now_s(), self._dead_nodes()
        nodes = []
        for name in sorted(self._cluster.nodes):
            heard_s = self._members.last_heard_s(name)
            alive = heard_s is not None and name not in dead
            reports = list(self._members.reports(name).values())
            age_s = -1.0 if heard_s is None else now_s - heard_s
            nodes.append(NodeStatus(self._cluster.nodes[name].node, alive, age_s, reports))
        same_host = self._cluster.setup is not None and self._cluster.setup.same_host
        return StatusReply(self._address, self._cluster.routing, nodes, len(self._cluster.sessions), same_host)

    def _new_target(self, change: Change, chain: int, node: str) -> ChainTarget:
        target = self._runtime.random_bytes(TARGET_ID_BYTES)
        change.targets[target] = Target(target, node, chain)
        return ChainTarget(target, TargetState.OFFLINE)

    # ---- what changes by itself

    async def _begin(self) -> None:
        """This manager becomes primary: it knows the tables, and has heard nobody yet."""
        await self._cluster.load()
        self._members.forget_all()
        self._sessions.forget_all()
        self._unsettled = set(self._cluster.chains)
        self._dead = frozenset()
        self._moves_planned_for = None

    async def _tick_for_ever(self) -> None:
        while True:
            await self._runtime.sleep(self._config.tick_s)
            if not self._election.is_primary:
                self._cluster.wake()
                continue
            self._note_deaths()
            for plan in self._plans():
                await self._carry_out(plan)

    async def _carry_out(self, plan: Plan) -> None:
        """One plan of a tick. If it fails, the others and the next tick go on: failover must not end with it."""
        try:
            await self._cluster.change(plan)
        except EmberError as error:
            log.warning("the cluster's tables could not be changed: %s", error)
        except Exception as error:
            if self._mistake != repr(error):
                log.exception("a change of the cluster's tables could not be planned")
            self._mistake = repr(error)

    def _plans(self) -> list[Plan]:
        """What this tick has to do."""
        plans: list[Plan] = []
        if self._expire_sessions() is not None:
            plans.append(self._expire_sessions)
        if self._cluster.config.waits_s > self._cluster.settings.dead_after_s:
            plans.append(self._shorten_wait)
        if self._unsettled:
            plans.append(self._settle_chains)
        alive = frozenset(self._cluster.nodes) - self._dead
        if self._moves_planned_for != (self._cluster.routing.version, self._cluster.config.version, alive):
            plans.append(self._move)
        return plans

    def _note_deaths(self) -> None:
        dead = self._dead_nodes()
        self._unsettle(dead ^ self._dead)
        self._dead = dead

    def _unsettle(self, nodes: Collection[str]) -> None:
        for target in self._cluster.targets.values():
            if target.node in nodes:
                self._unsettled.add(target.chain)

    def _expire_sessions(self) -> Change | None:
        return self._sessions.expire(now_s=self._runtime.now_s(), since_s=self._election.since_s)

    def _shorten_wait(self) -> Change | None:
        since_s = max(self._cluster.configured_s, self._election.since_s)
        row = after_wait(self._cluster.config_row, now_s=self._runtime.now_s(), since_s=since_s)
        return None if row is None else Change(config=row)

    def _settle_chains(self) -> Change | None:
        """A plan: one step of the state table for each chain that may have one."""
        cluster, members = self._cluster, self._members
        clock = {"now_s": self._runtime.now_s(), "since_s": self._election.since_s}
        dead = members.dead(cluster.nodes, **clock)
        change = Change(takes_for_dead=dead)
        for chain_id in sorted(self._unsettled):
            chain = cluster.chains[chain_id]
            nodes = {each.target: cluster.targets[each.target].node for each in chain.targets}
            if not all(members.is_known(node, **clock) for node in nodes.values()):
                continue  # A new primary: it will hear of them, or call them dead.
            after = next_chain(chain, self._reports_on(chain, dead))
            if after is chain:
                self._unsettled.discard(chain_id)
                continue
            log.info("chain %d, version %d -> %d", chain_id, chain.version, after.version)
            change.chains[chain_id] = after
            kept = {each.target for each in after.targets}
            change.targets.update((target, None) for target in nodes if target not in kept)
        return change if change.is_routing else None

    def _reports_on(self, chain: Chain, dead: Collection[str]) -> dict[bytes, TargetReport]:
        """What the living nodes say of the targets of `chain`."""
        reports = {}
        for each in chain.targets:
            node = self._cluster.targets[each.target].node
            if node in dead:
                continue
            report = self._members.reports(node).get(each.target)
            if report is None and each.state == TargetState.SERVING:
                # A late heartbeat, from before the node knew of this target: it may serve it inside its lease by now.
                report = TargetReport(each.target, each.generation, LocalState.ONLINE)
            if report is not None:
                reports[each.target] = report
        return reports

    def _move(self) -> Change | None:
        """A plan: begin moves off draining nodes and to joining ones."""
        cluster = self._cluster
        if cluster.setup is None:
            return None
        alive = frozenset(cluster.nodes) - self._dead_nodes()
        layout = Layout(cluster.chains, cluster.targets, cluster.nodes, alive=alive, same_host=cluster.setup.same_host)
        moves, is_all = plan_moves(layout, limit=cluster.settings.moves_max)
        change = Change()
        for move in moves:
            self._begin_move(change, move)
        if is_all:
            change.nodes.update((name, replace(cluster.nodes[name], joining=False)) for name in sorted(layout.joining))
        if not change.is_routing:
            self._moves_planned_for = (cluster.routing.version, cluster.config.version, alive)
            return None
        return change

    def _begin_move(self, change: Change, move: Move) -> None:
        chain = self._cluster.chains[move.chain]
        self._unsettled.add(chain.id)
        if move.stays is not None:
            leaving = {each.target for each in chain.targets if each.leaving} - {move.stays} | {move.target}
            targets = tuple(replace(each, leaving=each.target in leaving) for each in chain.targets)
            change.chains[chain.id] = replace(chain, version=chain.version + 1, targets=targets)
            return
        new = self._new_target(change, chain.id, move.to)
        if chain.version == 0:
            targets = tuple(new if each.target == move.target else each for each in chain.targets)
            change.targets[move.target] = None
            change.chains[chain.id] = replace(chain, targets=targets)
            return
        targets = tuple(replace(each, leaving=each.leaving or each.target == move.target) for each in chain.targets)
        change.chains[chain.id] = replace(chain, version=chain.version + 1, targets=(*targets, new))


def _nothing() -> None:
    """A plan that only waits for those before it."""


def _node_change(row: NodeRow) -> Change:
    return Change(nodes={row.node.name: row})
