"""A storage node: the targets of one disk, kept in step with the manager, and one service for all of them.

Heartbeats renew the lease and bring routing and sessions; a question that waits at the manager brings a newer routing
as soon as there is one. What the routing assigns to this node is opened, what it takes away is dropped. Invariants:
  - Nothing is served before a routing names this very incarnation of the node: what the last one promised, it promised.
  - A lease is only renewed once the routing that came with it is in force.
  - A target that was reported offline is not served by this incarnation any more: the report may be acted on late.

Does not know: how updates travel, or where a target's files are (`open_target` does).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from ..engine import Action, ChunkEngine, Update
from ..errors import (
    AccessDenied,
    AlreadyExists,
    Corruption,
    EmberError,
    ProtocolError,
    StaleRouting,
    Unavailable,
    UpdateUnknown,
)
from ..lane.server import Lanes
from ..messages import (
    AskCommitted,
    Done,
    Drop,
    Forward,
    GetRouting,
    Heartbeat,
    HeartbeatReply,
    Install,
    InstallRequests,
    ListChunks,
    ListVersions,
    Message,
    ReadChunks,
    RemoveChunks,
    RoutingReply,
    ScrubChunks,
    Settled,
    SyncDone,
    TargetReport,
    TruncateChunk,
    Vouch,
    WriteChunks,
)
from ..routing import LocalState, Node, Routing
from ..runtime import Runtime
from ..settings import Config, Settings
from ..transport.types import Network
from ..waiting import all_of, call, drop, finish, first_of, look, pause
from .config import StorageConfig
from .items import by_chain, name_of, removals, run_parts, writes
from .lease import Lease
from .pace import Paces
from .replica import Replica
from .resync import ResyncProgress
from .scrubber import Scrubber
from .service import check_batch, chunks_read
from .sessions import Sessions
from .upkeep import Upkeep

T = TypeVar("T")
OpenTarget = Callable[[bytes], Awaitable[ChunkEngine]]
"""Target id -> its engine. Absent, or another target's: a fresh one. Raises OSError or EmberError if the disk fails."""
DropTarget = Callable[[bytes], Awaitable[None]]
"""The target is not ours any more: its data may go. Its engine is closed already."""

UNANSWERED_FACTOR = 0.2
"""After a heartbeat that was not answered the next one comes in this part of the time: a new primary must be found
before the lease is over, one manager after the other."""
UNANSWERED_WARN = 10
"""Questions in a row that no manager answered, after which the log says so."""
BEAT_REST_S = 0.1
"""At least so long between two heartbeats, however many clients are asked for: the least `heartbeat_s` there may be."""
ANSWER_S_MIN = 0.5
"""A manager has at least so long for an answer, however short heartbeat_s is: its tables may be on a slow disk."""
FOLLOW_WAIT_S = 5.0
"""How long the manager holds a question for a newer routing."""
FOLLOW_REST_S = 0.1
"""Pause after a question that the manager did not hold, and answered with nothing newer."""
FAILED_REST_S = 1.0
"""Pause before a task begins anew that ended by an error of our own."""
BEAT_FAILURES_MAX = 10
"""After so many errors of our own in a row the server stops: without heartbeats it serves nothing anyway."""

log = logging.getLogger("emberline.storage")

_OF_NEIGHBOURS = (Forward, Vouch, Settled, AskCommitted, ListVersions, Install, Drop, InstallRequests, SyncDone)


class StorageNode:
    """Serves the targets of one disk. `start` once others can reach it, `close` at the end."""

    def __init__(
        self,
        node: Node,
        runtime: Runtime,
        network: Network,
        managers: Sequence[str],
        open_target: OpenTarget,
        *,
        drop_target: DropTarget | None = None,
        config: StorageConfig | None = None,
        lanes: Lanes | None = None,
    ) -> None:
        """`managers`: addresses. `node.incarnation` must be new with each process. `lanes`: those of our server."""
        self._lanes = lanes
        self.node = node
        self.config = config or StorageConfig()
        self.settings = Settings()
        """Of the whole cluster, as they were heard last."""
        self.lease = Lease(runtime)
        self.routing = Routing(0)
        self.replicas: dict[int, Replica] = {}
        """By chain."""
        self.stopped_because: str | None = None
        """Another process has this node's name, or heartbeats fail here: nothing is served any more."""
        self._runtime = runtime
        self._network = network
        self._managers = list(managers)
        self._open_target = open_target
        self._drop_target = drop_target
        self._sessions = Sessions()
        self._config_version = 0
        self._retuned = runtime.future()
        """Done when other settings are in force."""
        self._paces = Paces(runtime, parallel=self.config.resync_parallel)
        self._upkeeps: dict[int, Upkeep] = {}
        self._broken: dict[bytes, str] = {}
        """Targets that could not be opened, and why. They are reported offline until the server is started again."""
        self._unanswered = 0
        """Heartbeats, and questions before the first one, since the last heartbeat that was taken."""
        self._is_cut_off = False
        """That was said."""
        self._closing = runtime.future()
        self.scrubber = Scrubber(
            self.replicas, runtime, settings=lambda: self.settings, config=self.config, closing=self._closing
        )
        self._beat_now = runtime.future()
        self._curious: list[asyncio.Future[None]] = []
        """Each is done when a heartbeat that was sent after it was made has been answered."""
        self._applying: asyncio.Task[None] | None = None
        self._applied_version: int | None = None
        """Of the routing; a newer one that came meanwhile is applied by the next heartbeat."""
        self._tasks: list[asyncio.Task[Any]] = []
        self._calls: dict[asyncio.Task[Message], None] = {}

    # --- life ------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Begin to send heartbeats."""
        self._begin_task(self._beat, "heartbeats")
        self._begin_task(self._look_after, "upkeep")

    async def retire(self) -> None:
        """Serve nothing any more and say so to the manager, so that others take over now and not after our lease.

        The calls that wait for a neighbour end with that. `close` comes next.
        """
        for replica in self.replicas.values():
            await replica.close()
        told = self._runtime.future()
        self._curious.append(told)
        finish(self._beat_now)
        await pause(self._runtime, self.settings.lease_s, told)

    async def close(self) -> None:
        """Serve nothing any more, let what is under way end, and close the engines. The network is the caller's.

        Raises an error of theirs, after all of them are closed.
        """
        finish(self._closing)
        for each in self._curious:
            finish(each)
        for replica in self.replicas.values():
            await replica.close()
        while self._calls:
            await first_of(self._runtime, *self._calls)
        for task in self._tasks:
            await task
        if self._applying is not None:
            await first_of(self._runtime, self._applying)
        replicas = list(self.replicas.values())
        self.replicas.clear()
        ended = await all_of(self._runtime, [self._close_engine(each) for each in replicas], "close-target")
        if self._applying is not None:
            self._applying.result()
        for error in ended:
            if error is not None:
                raise error

    async def _close_engine(self, replica: Replica) -> None:
        await replica.close()
        await replica.engine.close()

    def _begin_task(self, work: Callable[[], Awaitable[None]], name: str) -> None:
        """Begin what goes on until `close`."""
        self._tasks.append(self._runtime.spawn(self._go_on(work, name), name))

    async def _go_on(self, work: Callable[[], Awaitable[None]], name: str) -> None:
        """An error of our own must not end it: nobody would notice that the disk is scrubbed no more, for example."""
        while not self._closing.done() and self.stopped_because is None:
            try:
                await work()
                return
            except Exception:
                log.exception("the task %s failed, and begins anew", name)
                await pause(self._runtime, FAILED_REST_S, self._closing)

    def progress(self) -> list[ResyncProgress]:
        """The resyncs that this node drives."""
        return [each.resync.progress for each in self.replicas.values() if each.resync.progress is not None]

    def gauges(self) -> dict[str, float]:
        """Figures for metrics."""
        resyncs = self.progress()
        return {
            "storage_targets": len(self.replicas),
            "storage_targets_broken": len(self._broken),
            "storage_lease_valid": float(self.lease.is_valid),
            "storage_resyncs": len(resyncs),
            "storage_migrations": sum(each.is_migration for each in resyncs),
            "storage_resync_sent_bytes": sum(each.sent_bytes for each in resyncs),
            "storage_repaired_chunks": sum(each.repairer.repaired for each in self.replicas.values()),
            **self.scrubber.gauges(),
        }

    # --- the manager -----------------------------------------------------------------------------------------------

    async def _beat(self) -> None:
        await self._learn_targets()
        self._begin_task(self._follow_changes, "routing")
        failures = 0
        while not self._closing.done():
            self._beat_now = self._runtime.future()
            curious, self._curious = self._curious, []
            sent_s, interval_s = self._runtime.now_s(), self.settings.heartbeat_s
            try:
                self._sessions.ask()
                versions = (self.routing.version, self._sessions.version, self._config_version)
                request = Heartbeat(self.node, self.reports(), *versions)
                reply = await self._ask(request, HeartbeatReply)
                await self._take(reply, sent_s)
                failures = 0
                for each in curious:
                    finish(each)
            except AlreadyExists as error:
                await self._stop(str(error))
                return
            except EmberError as error:
                self._curious += curious
                self._note_unanswered(error)
                interval_s *= UNANSWERED_FACTOR
            except Exception as error:
                self._curious += curious
                log.exception("a heartbeat failed")
                failures += 1
                if failures == BEAT_FAILURES_MAX:
                    await self._stop(f"heartbeats fail: {error!r}")
                    return
            await self._rest(sent_s, interval_s)

    async def _rest(self, sent_s: float, interval_s: float) -> None:
        """Wait until `interval_s` after the last heartbeat; when one is asked for, only BEAT_REST_S."""
        passed_s = self._runtime.now_s() - sent_s
        if passed_s < BEAT_REST_S:
            await pause(self._runtime, BEAT_REST_S - passed_s, self._closing)
        left_s = interval_s - (self._runtime.now_s() - sent_s)
        if left_s > 0 and not self._beat_now.done() and not self._closing.done():
            timer = self._runtime.timer(left_s)
            await first_of(self._runtime, timer, self._beat_now, self._closing)
            timer.cancel()

    async def _stop(self, reason: str) -> None:
        self.stopped_because = reason
        log.error("this server must stop: %s", reason)
        for replica in self.replicas.values():
            await replica.close()

    async def _learn_targets(self) -> None:
        """Open what is ours before the first heartbeat: a restart proves by its disk that it is the only one, and by
        the routing it knows that it came last."""
        due_s = self._runtime.now_s() + self.settings.lease_s
        while not self._closing.done():
            try:
                reply = await self._ask(GetRouting(), RoutingReply)
            except EmberError as error:
                self._note_unanswered(error)
                await pause(self._runtime, self.settings.heartbeat_s, self._closing)
                continue
            if reply.routing is not None:
                self.routing = reply.routing
                await self._open_targets(reply.routing)
            if not self._broken or self._runtime.now_s() >= due_s:
                return
            # Nothing is reported yet. The process before us may still be about to let go of the disk.
            self._broken.clear()
            await pause(self._runtime, self.settings.heartbeat_s, self._closing)

    def _note_unanswered(self, error: EmberError) -> None:
        """A change of the primary is no news. That this server is cut off is, and that it is not let in: said once."""
        self._unanswered += 1
        if not self._is_cut_off and (isinstance(error, AccessDenied) or self._unanswered >= UNANSWERED_WARN):
            self._is_cut_off = True
            log.warning("no manager answers, and without one nothing is served once the lease is over: %s", error)

    async def _follow_changes(self) -> None:
        """Learn of a chain change when it is made and not by the next heartbeat: until then nobody serves that chain.

        The lease is none of its business: a heartbeat renews it, with a routing that is no older.
        """
        while not self._closing.done() and self.stopped_because is None:
            asked_s, version = self._runtime.now_s(), self.routing.version
            try:
                reply = await self._ask(GetRouting(version, FOLLOW_WAIT_S), RoutingReply, FOLLOW_WAIT_S)
            except EmberError:
                await pause(self._runtime, self.settings.heartbeat_s, self._closing)
                continue
            self._adopt(reply.routing)
            if self.routing.version == version and self._runtime.now_s() - asked_s < FOLLOW_REST_S:
                await pause(self._runtime, FOLLOW_REST_S, self._closing)

    async def _ask(self, request: Message, kind: type[T], wait_s: float = 0.0) -> T:
        """Ask the manager that answered last; the next time another one, if it does not answer in time.

        `wait_s`: how long it may hold the question.
        """
        manager = self._managers[0]
        task = self._runtime.spawn(call(self._network.connection(manager), request), "to-manager")
        timer = self._runtime.timer(wait_s + max(2 * self.settings.heartbeat_s, ANSWER_S_MIN))
        try:
            await first_of(self._runtime, task, timer, self._closing)
            if not task.done():
                raise Unavailable("the manager did not answer in time")
            reply = task.result()
        except (Unavailable, UpdateUnknown, StaleRouting):
            if manager == self._managers[0]:
                self._managers.append(self._managers.pop(0))
            raise
        finally:
            drop(task)
            del task  # As in `waiting.until`.
            timer.cancel()
        assert isinstance(reply, kind)
        return reply

    async def _take(self, reply: HeartbeatReply, sent_s: float) -> None:
        if self._is_cut_off:
            log.info("a manager answers again")
        self._unanswered, self._is_cut_off = 0, False
        self._sessions.take(reply.sessions_version, reply.sessions)
        self._adopt(reply.routing)
        if reply.config is not None:
            self._retune(reply.config)
        self.lease.renew(sent_s, reply.lease_s)
        if self._lanes is not None:
            self._lanes.lease(self.lease.until_s)

    def _adopt(self, routing: Routing | None) -> None:
        """Go by `routing` if it is news, and open and drop targets as it says."""
        if routing is not None and routing.version > self.routing.version:
            self._follow(routing)
        is_applied = self._applied_version == self.routing.version
        if not is_applied and (self._applying is None or self._applying.done()):
            self._applying = self._runtime.spawn(self._apply(), "apply-routing")

    def _retune(self, config: Config) -> None:
        if not self._config_version:  # Now it is known whether, and how fast.
            self._begin_task(self.scrubber.run, "scrub")
            self._begin_task(self.scrubber.run_again, "scrub-again")
        self._config_version, self.settings = config.version, Settings.of(config.values)
        self._paces.retune(self.settings)
        retuned, self._retuned = self._retuned, self._runtime.future()
        finish(retuned)

    def reports(self) -> list[TargetReport]:
        """What the next heartbeat says of each target."""
        reports = []
        for replica in self.replicas.values():
            identity, (state, version) = replica.engine.identity, replica.local_state()
            used_bytes, free_bytes, idle_bytes = replica.engine.space()
            unmended = len(replica.repairer.unmended)
            reports.append(
                TargetReport(
                    identity.target, identity.generation, state, version, used_bytes, free_bytes, unmended, idle_bytes
                )
            )
        return reports + [TargetReport(target, b"", LocalState.OFFLINE) for target in self._broken]

    # --- the routing -----------------------------------------------------------------------------------------------

    def _follow(self, routing: Routing) -> None:
        """Let the replicas that are open go by `routing`, at once."""
        self.routing = routing
        incarnations = {each.name: each.incarnation for each in routing.nodes}
        if incarnations.get(self.node.name) != self.node.incarnation:
            return
        nodes = {each.name: each.address for each in routing.nodes}
        addresses = {each.id: nodes[each.node] for each in routing.targets if each.node in nodes}
        for chain in routing.chains:
            replica = self.replicas.get(chain.id)
            if replica is not None and any(each.target == replica.engine.identity.target for each in chain.targets):
                replica.follow(chain, addresses)

    async def _apply(self) -> None:
        """Open and drop targets until what is open is what the routing says."""
        version = self.routing.version
        await self._close_others(self.routing)
        await self._open_targets(self.routing)
        self._follow(self.routing)
        self._applied_version = version

    async def _open_targets(self, routing: Routing) -> None:
        for target in routing.targets:
            is_ours = target.node == self.node.name and target.chain not in self.replicas
            if not is_ours or target.id in self._broken or self._closing.done():
                continue
            try:
                engine = await self._open_target(target.id)
            except (EmberError, OSError) as error:
                self._broken[target.id] = str(error)
                log.error(
                    "target %s cannot be opened; once reported, it stays offline until a restart: %s",
                    target.id.hex(),
                    error,
                )
                continue
            replica = self.replicas[target.chain] = Replica(
                engine,
                self._runtime,
                self._network,
                lease=self.lease,
                check_session=self._sessions.check,
                paces=self._paces,
                config=self.config,
                lanes=self._lanes,
            )
            if self._lanes is not None:
                engine.extents.mirror = self._lanes.mirror(target.chain)
            self._upkeeps[target.chain] = Upkeep(replica)

    async def _close_others(self, routing: Routing) -> None:
        """Close what is not ours any more, and let its data go."""
        ours = {each.id for each in routing.targets if each.node == self.node.name}
        for target in [each for each in self._broken if each not in ours]:
            del self._broken[target]
        if not routing.version:
            return
        for chain, replica in list(self.replicas.items()):
            target = replica.engine.identity.target
            if target not in ours:
                del self.replicas[chain], self._upkeeps[chain]
                await replica.close()
                await replica.engine.close()
                if self._drop_target is not None:
                    await self._drop_target(target)

    async def _look_after(self) -> None:
        begin_s = self._runtime.now_s()
        while not self._closing.done():
            passed_s, retuned = self._runtime.now_s() - begin_s, self._retuned
            await pause(self._runtime, max(self.settings.tombstone_s - passed_s, 0.0), self._closing, retuned)
            if retuned.done():
                continue
            begin_s = self._runtime.now_s()
            for upkeep in list(self._upkeeps.values()):
                try:
                    await upkeep.purge()
                    if self.lease.is_valid:
                        await upkeep.drop_requests(self._sessions)
                except EmberError as error:
                    log.warning("upkeep of a target failed: %s", error)

    # --- requests --------------------------------------------------------------------------------------------------

    async def handle(self, request: Message, buffers: Sequence[memoryview] = (), /) -> Message:
        """Serve one request of a client or of another node. An update goes on to its end whatever the caller does."""
        if self._closing.done():
            raise Unavailable("this server is closing")
        if request.changes_nothing:
            return await self._serve(request, buffers)
        return await asyncio.shield(self._begin(request, buffers))

    def _begin(self, request: Message, buffers: Sequence[memoryview]) -> asyncio.Task[Message]:
        task = self._runtime.spawn(self._serve(request, buffers), type(request).__name__)
        self._calls[task] = None
        task.add_done_callback(self._end)
        return task

    def _end(self, task: asyncio.Task[Message]) -> None:
        del self._calls[task]
        look(task)

    async def _serve(self, request: Message, buffers: Sequence[memoryview]) -> Message:
        match request:
            case ReadChunks():
                return await self._read(request, buffers)
            case WriteChunks():
                return await self._update(request.client, request.chain_versions, writes(request, buffers))
            case TruncateChunk():
                name = name_of(request, 0)
                update = Update(request.chunk, Action.TRUNCATE, request.length, request=name)
                chain_versions, updates = [request.chain_version], [(request.chain, update)]
                return await self._update(request.client, chain_versions, updates, expected=[request.version])
            case RemoveChunks():
                chain_versions, updates = request.chain_versions, removals(request)
                return await self._update(request.client, chain_versions, updates, expected=request.versions)
            case ListChunks():
                return await self._replica(request.chain).list(request)
            case ScrubChunks():
                return await self.scrubber.serve(request)
        if isinstance(request, _OF_NEIGHBOURS):
            return await self._replica(request.chain).handle(request, buffers)
        raise ProtocolError(f"a storage node does not serve {type(request).__name__}")

    def _replica(self, chain: int) -> Replica:
        replica = self.replicas.get(chain)
        if replica is None:
            raise StaleRouting(f"no target of chain {chain} is here")
        return replica

    async def _read(self, request: ReadChunks, buffers: Sequence[memoryview]) -> Message:
        check_batch(len(request.chunks))
        results: list[int | Corruption] = [0] * len(buffers)

        async def read_of(chain: int, version: int, indices: list[int]) -> None:
            part = await self._replica(chain).read(
                version,
                [request.chunks[index] for index in indices],
                [request.offsets[index] for index in indices],
                destinations=[buffers[index] for index in indices],
                local=request.local,
            )
            for index, result in zip(indices, part, strict=True):
                results[index] = result

        groups = by_chain(request.chains, request.chain_versions)
        await run_parts(
            self._runtime, [read_of(chain, version, indices) for (chain, version), indices in groups.items()]
        )
        return chunks_read(results)

    async def _update(
        self,
        client: bytes,
        chain_versions: Sequence[int],
        updates: Sequence[tuple[int, Update]],
        *,
        expected: Sequence[int] = (),
    ) -> Message:
        """`expected`: the version of each chunk that the client has seen, 0 if it did not look; or empty."""
        check_batch(len(updates))
        if expected and len(expected) != len(updates):
            raise ProtocolError("a request names the version of each chunk, or of none")
        await self._know(client)
        groups = by_chain([chain for chain, _ in updates], chain_versions)
        await run_parts(
            self._runtime,
            [
                self._replica(chain).update(
                    version,
                    [updates[index][1] for index in indices],
                    expected={updates[index][1].chunk: expected[index] for index in indices} if expected else None,
                )
                for (chain, version), indices in groups.items()
            ],
            changes=True,
        )
        return Done()

    async def _know(self, client: bytes) -> None:
        """A client that is new to us is asked for once. Raises SessionExpired; StaleRouting if nobody tells us."""
        if self._sessions.is_live(client):
            return
        told = self._runtime.future()
        if self.lease.is_valid:
            self._curious.append(told)
            finish(self._beat_now)
            await pause(self._runtime, self.settings.lease_s, told)
        if not told.done() or self._closing.done():
            # Not the client's fault: to say that its session is over would make it give up what hangs on it.
            raise StaleRouting("this server does not hear from the manager whether the client's session is live")
        self._sessions.check(client)
