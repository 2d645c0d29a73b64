"""One target in its chain: what clients and neighbours ask of it, answered by its role in the present chain version.

Protocol: docs/replication.md. Invariants:
  - One update of a chunk at a time: its lock is held from the look at its row until it is committed or left pending.
    Locks are only waited for down the chain, so nobody waits in a circle; reads and `AskCommitted` take none.
  - What the chain version, the lease or the session allows is checked before the lock is taken and again under it.
  - Whatever is pending here is pending or committed at every serving target before us, or was never committed.

Does not know: heartbeats, or other chains.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from ..engine import Action, ChunkEngine, ChunkState, Request, Update
from ..engine.record import decode_record
from ..errors import (
    Corruption,
    ProtocolError,
    SessionExpired,
    StaleChunk,
    StaleRouting,
    TargetFailed,
    Unavailable,
    UpdateUnknown,
)
from ..lane.server import ChainLanes, Lanes
from ..locks import KeyedLocks
from ..messages import (
    AskCommitted,
    ChunkList,
    ChunkVersions,
    CommittedVersions,
    Done,
    Drop,
    Forward,
    Forwarded,
    Install,
    InstallRequests,
    ListChunks,
    ListVersions,
    Message,
    Settled,
    SyncDone,
    Vouch,
)
from ..routing import Chain, LocalState
from ..runtime import Runtime
from ..transport.types import Network
from ..waiting import finish, first_of, pause
from .config import StorageConfig
from .forward import Passing
from .items import forwarded
from .lease import Lease
from .pace import Paces
from .passing import Passer
from .repair import Repairer
from .resync import Resync
from .service import rounds
from .settle import Settler
from .view import View

LOOKS_MAX = 16
"""So often a read looks again at a chunk that changes while it is read."""
SessionCheck = Callable[[bytes], None]
"""Raises SessionExpired for a client without a live session."""


class Replica:
    """One target. `follow` tells it its chain; until then it serves nothing."""

    def __init__(
        self,
        engine: ChunkEngine,
        runtime: Runtime,
        network: Network,
        *,
        lease: Lease,
        check_session: SessionCheck,
        paces: Paces,
        config: StorageConfig,
        lanes: Lanes | None = None,
    ) -> None:
        self.engine = engine
        self._lanes = ChainLanes(lanes)
        self.locks = KeyedLocks(runtime)
        self.passer = Passer(engine, runtime)
        self.resync = Resync(self, runtime, paces=paces, config=config)
        self.repairer = Repairer(self, runtime)
        self.view: View | None = None
        self._settler = Settler(self, runtime, config=config)
        self._runtime = runtime
        self._network = network
        self._lease = lease
        self._check_session = check_session
        self._config = config
        self._has_left = False
        """The chain has enough others, and this target leaves it."""
        self._is_closed = False
        self._handlers: dict[type[Message], Callable[[Any, Sequence[memoryview]], Awaitable[Message]]] = {
            Forward: self._forward,
            Vouch: self._vouch,
            Settled: self._settled,
            AskCommitted: self._ask_committed,
            ListVersions: self._list_versions,
            Install: self._install,
            Drop: self._drop,
            InstallRequests: self._install_requests,
            SyncDone: self._sync_done,
        }

    # --- its place -------------------------------------------------------------------------------------------------

    def follow(self, chain: Chain, addresses: dict[bytes, str]) -> None:
        """Go by `chain` from now on, unless it is no newer. `addresses`: where its targets are."""
        if self._has_left or self._is_closed or (self.view is not None and chain.version <= self.view.version):
            return
        if self.view is not None:
            finish(self.view.changed)
        if chain.may_leave(self.engine.identity.target):
            # For good: the report that follows may be acted on late, and a reader must not be answered after that.
            self._has_left, self.view = True, None
            self._lanes.stop()
            return
        self.view = View(self._runtime, self._network, chain, self.engine.identity.target, addresses=addresses)
        if self.view.is_serving and self._is_trusted(self.view):
            self._lanes.serve(chain.id, chain.version)
        else:
            self._lanes.stop()
        self._settler.begin(self.view)
        self.resync.begin(self.view)

    async def close(self) -> None:
        """Serve nothing any more, and let what is under way end."""
        self._is_closed = True
        if self.view is not None:
            finish(self.view.changed)
            self.view = None
            self._lanes.stop()
        await self._settler.close()
        await self.resync.close()
        await self.repairer.close()

    def _is_trusted(self, view: View) -> bool:
        """The chain trusts what is on our disk."""
        return view.me is not None and view.me.generation in (b"", self.engine.identity.generation)

    def local_state(self) -> tuple[LocalState, int]:
        """What the node reports of this target: (state, version under which its resync ended)."""
        view = self.view
        if self.engine.failure is not None or self._is_closed or self._has_left:
            return LocalState.OFFLINE, 0
        if view is None or view.me is None or view.me.generation != self.engine.identity.generation:
            return LocalState.FRESH, 0
        if view.is_serving:
            return LocalState.UP_TO_DATE, 0
        if view.is_syncing and view.synced:
            return LocalState.UP_TO_DATE, view.version
        return LocalState.ONLINE, 0

    def serving_view(self, version: int) -> View:
        """The present view, if a client's request may be served in it. Raises StaleRouting."""
        view = self._view(version)
        if not view.is_serving:
            raise StaleRouting("this replica does not serve")
        if self.engine.failure is not None:
            raise StaleRouting(f"this replica's disk has failed: {self.engine.failure}")
        self._lease.check()
        return view

    def head_view(self, version: int, client: bytes) -> View:
        """The present view, if it lets this client write here. Raises StaleRouting, SessionExpired."""
        view = self.serving_view(version)
        if not view.is_head:
            raise StaleRouting("this replica is not the head of its chain")
        self._check_session(client)
        return view

    def _view(self, version: int) -> View:
        view = self.view
        if view is None or version != view.version:
            ours = view.version if view is not None else 0
            raise StaleRouting(f"chain version {version} is asked for, and {ours} is known here")
        if (view.is_serving or view.is_syncing) and not self._is_trusted(view):
            raise StaleRouting("the disk of this replica has another content than its chain trusts")
        return view

    # --- updates ---------------------------------------------------------------------------------------------------

    async def update(
        self, version: int, updates: Sequence[Update], *, expected: Mapping[bytes, int] | None = None
    ) -> None:
        """Apply a client's `updates` (no versions yet) in order and have them committed by the whole chain.

        `expected`: committed versions of chunks that are only changed if they still have them. StaleChunk, once the
        others are changed, if some have not. An absent chunk counts as one that has it.

        Raises StaleRouting, SessionExpired, NoSpace, Corruption, StaleChunk, Unavailable (nothing of the last of them
        happened), UpdateUnknown.
        """
        client = updates[0].request.client
        self.head_view(version, client)
        chunks = list({each.chunk: None for each in updates})
        await self.locks.acquire(chunks)
        done = changed = 0
        try:
            for batch in rounds(updates):
                changed += await self._update_round(self.head_view(version, client), batch, expected or {})
                done += 1
                version = self.view.version if self.view is not None else version
        except (StaleRouting, Unavailable, SessionExpired) as error:
            if done:
                raise UpdateUnknown(f"a part was done, then: {error}") from error
            raise
        finally:
            self.locks.release(chunks)
        if changed:
            raise StaleChunk(f"{changed} of {len(updates)} chunks changed since they were looked at: they stay")

    async def _update_round(self, view: View, updates: Sequence[Update], expected: Mapping[bytes, int]) -> int:
        """One update each of several chunks, whose locks are held. Returns how many are not of the expected version."""
        chunks = [each.chunk for each in updates]
        states = await self.engine.states(chunks)
        left = {
            chunk: state.pending_version
            for chunk, state in zip(chunks, states, strict=True)
            if state is not None and state.pending_version
        }
        if left:
            await self.settle(left, given_up_as=Unavailable)
            states = await self.engine.states(chunks)
        view = self._same_head(view)
        named, changed = await self._named(view, updates, states, expected)
        if not named:
            return changed
        try:
            if view.link is None:
                await self._repaired(view, lambda: self.engine.prepare(named, publish=True, checks_requests=False))
            else:
                await self._repaired(view, lambda: self.passer.pass_on(view, named, passing=None))
        except TargetFailed as error:
            raise UpdateUnknown(f"the disk failed: {error}") from error
        except UpdateUnknown:
            await self.settle({each.chunk: each.version or 0 for each in named}, given_up_as=UpdateUnknown)
        return changed

    def _same_head(self, view: View) -> View:
        """The present view: we may have waited, and the chain changed; but nothing of the update has happened yet."""
        now = self.view
        if now is None or not now.is_head:
            raise StaleRouting("this replica is not the head of its chain any more")
        return now

    async def _named(
        self,
        view: View,
        updates: Sequence[Update],
        states: Sequence[ChunkState | None],
        expected: Mapping[bytes, int],
    ) -> tuple[list[Update], int]:
        """`updates` as every replica will carry them out, less those that are done, and less those of chunks that are
        not of the expected version: how many of them. Raises StaleChunk, Corruption.
        """
        last = await self.engine.last_sequences([each.request for each in updates])
        named, changed = [], 0
        for update, state, sequence in zip(updates, states, last, strict=True):
            if sequence is not None and sequence >= update.request.sequence:
                if sequence == update.request.sequence:
                    continue
                raise StaleChunk(f"a late copy of request {update.request.sequence}: {sequence} was done since")
            if state is not None and state.damaged:
                await self.repairer.repair(view, update.chunk)
                (state,) = await self.engine.states([update.chunk])
                if state is not None and state.damaged:
                    raise Corruption("the row of the chunk is damaged, and no replica could repair it")
            is_absent = state is None or state.removed or not state.version
            if state is not None and not is_absent and expected.get(update.chunk, 0) not in (0, state.version):
                changed += 1
                continue
            if update.action is Action.TRUNCATE and is_absent:
                # It stays absent, and still every replica notes the request.
                update = update._replace(action=Action.REMOVE, offset=0)
            current = state.version if state is not None and state.version else self.engine.floor
            named.append(update._replace(version=current + 1, chain_version=view.version))
        return named, changed

    async def _repaired(self, view: View, work: Callable[[], Awaitable[Any]]) -> Any:
        """`work`, once more if a damaged chunk that it met could be repaired."""
        try:
            return await work()
        except Corruption as error:
            chunk = self.repairer.named(error)
            if chunk is None or not await self.repairer.repair(view, chunk):
                raise
        return await work()

    async def settle(self, versions: dict[bytes, int], *, given_up_as: type[Unavailable] | type[UpdateUnknown]) -> None:
        """Get what is pending of `versions` (chunk -> version; locks held) committed, through changes of the chain.

        Only the head does it. Raises NoSpace, Corruption, or `given_up_as` when the time is over.
        """
        due_s = self._runtime.now_s() + self._config.forward_wait_s
        chunks = list(versions)
        problem: Exception = StaleRouting("this replica is not the head of its chain any more")
        while (view := self.view) is not None and view.is_head:
            try:
                await self.passer.bring(view, chunks)
                states = await self.engine.states(chunks)
                for state, version in zip(states, versions.values(), strict=True):
                    if state is None or state.version < version:
                        raise given_up_as("a prepared update was lost before it was committed")
                return
            except (UpdateUnknown, Unavailable, StaleRouting) as error:
                problem = error
            except TargetFailed as error:
                raise given_up_as(f"the disk failed: {error}") from error
            except Exception as error:
                self._settler.order(chunks)
                if given_up_as is UpdateUnknown:
                    raise UpdateUnknown(f"it is prepared here, and not committed: {error}") from error
                raise
            if self._runtime.now_s() >= due_s:
                break
            if not view.changed.done():
                await pause(self._runtime, self._config.retry_s, view.changed)
        self._settler.order(chunks)
        raise given_up_as(f"not committed by the whole chain: {problem}") from problem

    # --- reads -----------------------------------------------------------------------------------------------------

    async def read(
        self,
        version: int,
        chunks: Sequence[bytes],
        offsets: Sequence[int],
        *,
        destinations: Sequence[memoryview],
        local: bool | None,
    ) -> list[int | Corruption]:
        """As `ChunkEngine.read`: the newest committed bytes, or what is here (`ReadChunks.local`).

        Raises StaleRouting, Unavailable.
        """
        view = self.serving_view(version)
        results = await self._read(view, chunks, offsets, destinations, local)
        self.serving_view(version)
        for chunk, result in zip(chunks, results, strict=True):
            if isinstance(result, Corruption):
                self.repairer.order(view, chunk)
        return results

    async def _read(
        self,
        view: View,
        chunks: Sequence[bytes],
        offsets: Sequence[int],
        destinations: Sequence[memoryview],
        local: bool | None,
    ) -> list[int | Corruption]:
        if local is not None:
            return await self.engine.read(chunks, offsets, destinations, pending=[local] * len(chunks))
        states = await self.engine.states(chunks)
        dirty = [index for index, state in enumerate(states) if state is not None and state.pending_version]
        if not dirty:
            return await self.engine.read(chunks, offsets, destinations)
        clean = [index for index in range(len(chunks)) if index not in set(dirty)]
        results: list[int | Corruption] = [0] * len(chunks)
        parts = await self.engine.read(
            [chunks[index] for index in clean],
            [offsets[index] for index in clean],
            [destinations[index] for index in clean],
        )
        for index, part in zip(clean, parts, strict=True):
            results[index] = part
        for index in dirty:
            results[index] = await self._read_dirty(view, chunks[index], offsets[index], destinations[index])
        return results

    async def _read_dirty(self, view: View, chunk: bytes, offset: int, destination: memoryview) -> int | Corruption:
        """A read that met a pending version: the tail knows whether it is committed."""
        for _ in range(LOOKS_MAX):
            (state,) = await self.engine.states([chunk])
            is_pending = False
            if state is not None and state.pending_version:
                committed = await self._committed_at_tail(view, chunk)
                if committed > state.pending_version:
                    continue
                is_pending = committed == state.pending_version
            (result,) = await self.engine.read([chunk], [offset], [destination], pending=[is_pending])
            if not is_pending:
                return result
            (after,) = await self.engine.states([chunk])
            assert state is not None
            # If it was committed meanwhile and another one came, the bytes may be of that one.
            version = state.pending_version
            if after is not None and (after.pending_version or after.version) == version:
                return result
        raise Unavailable("the chunk changes all the time: try again")

    async def _committed_at_tail(self, view: View, chunk: bytes) -> int:
        if view.is_tail:
            return (await self._committed(view, [chunk]))[0]
        tail = view.chain.serving[-1]
        request = AskCommitted(view.chain.id, view.version, [chunk])
        try:
            reply = await view.connection(tail.target).call(request)
        except UpdateUnknown as error:
            raise Unavailable(f"the tail did not say what is committed: {error}") from error
        assert isinstance(reply, CommittedVersions)
        return reply.versions[0]

    async def _committed(self, view: View, chunks: Sequence[bytes]) -> list[int]:
        """What the tail has committed, settled first if of an older chain version. Raises Unavailable."""
        states = await self.engine.states(chunks)
        if not view.settled.done() and any(_is_open(state, view) for state in states):
            await self._wait_settled(view)
            states = await self.engine.states(chunks)
        if any(state is not None and state.damaged for state in states):
            raise Unavailable("the row of a chunk is damaged at the tail")
        if any(_is_open(state, view) for state in states):
            raise Unavailable("the head could not settle a chunk yet: what is committed of it is not known")
        return [state.version if state is not None else 0 for state in states]

    async def _wait_settled(self, view: View) -> None:
        """Return once older chain versions are settled, or the chain has changed. Raises Unavailable in the end."""
        timer = self._runtime.timer(self._config.forward_wait_s)
        try:
            await first_of(self._runtime, view.settled, view.changed, timer)
        finally:
            timer.cancel()
        if not (view.settled.done() or view.changed.done()):
            raise Unavailable("the head has not settled yet what older chain versions left")

    async def list(self, request: ListChunks) -> ChunkList:
        """Committed chunks of a range, as the tail has them.

        Raises StaleRouting; Unavailable if it is not known whether something that is pending there was committed.
        """
        view = self.serving_view(request.chain_version)
        if not view.is_tail:
            raise StaleRouting("chunks are listed at the tail of a chain")
        if not view.settled.done():
            await self._wait_settled(view)
        rows = await self.engine.scan(request.begin, request.end, limit=request.limit, reverse=request.reverse)
        found, versions = [], []
        for chunk, row in rows:
            try:
                record = decode_record(chunk, row)
            except Corruption:
                found.append((chunk, 0))  # It must not hide the others; whoever reads it is told.
                versions.append(0)
                continue
            committed, pending = record.committed, record.pending or record.removal
            if pending is not None and pending.chain_version < view.version:
                raise Unavailable("the head could not settle a listed chunk yet")
            if committed is not None:
                found.append((chunk, committed.length))
                versions.append(committed.version)
        self.serving_view(request.chain_version)
        return ChunkList(found, versions)

    # --- neighbours ------------------------------------------------------------------------------------------------

    def handle(self, request: Any, buffers: Sequence[memoryview]) -> Awaitable[Message]:
        """Serve what a neighbour asks. Raises StaleRouting in another chain version."""
        return self._handlers[type(request)](request, buffers)

    async def _forward(self, request: Forward, buffers: Sequence[memoryview]) -> Message:
        view = self._view(request.chain_version)
        if not (view.is_serving or view.is_syncing):
            raise StaleRouting("this replica takes no updates")
        updates = forwarded(request, buffers)
        passing = view.inbound.begin(request.number, request.oldest)
        if request.vouched:
            passing.tell(abandoned=False)
        try:
            await self.locks.acquire(request.chunks)
            try:
                return await self._forward_locked(view, request, updates, passing)
            finally:
                self.locks.release(request.chunks)
        finally:
            view.inbound.end(request.number)

    async def _forward_locked(
        self, view: View, request: Forward, updates: Sequence[Update], passing: Passing
    ) -> Forwarded:
        if view is not self.view or passing.given_up.done():
            raise UpdateUnknown("given up by the predecessor, or the chain changed")
        if view.is_syncing:
            if not request.whole:
                raise ProtocolError("a syncing replica takes replacements only")
            prepared = await self.passer.install(updates)
        else:
            if not view.settled.done():
                view.brought.update(dict.fromkeys(each.chunk for each in updates))
            whole = request.whole
            prepared = await self._repaired(
                view, lambda: self.passer.pass_on(view, updates, passing=passing, whole=whole)
            )
        return Forwarded([each.length for each in prepared], [each.crc for each in prepared])

    async def _vouch(self, request: Vouch, _: Sequence[memoryview]) -> Message:
        self._view(request.chain_version).inbound.tell(request.number, abandoned=request.abandoned)
        return Done()

    async def _settled(self, request: Settled, _: Sequence[memoryview]) -> Message:
        view = self._view(request.chain_version)
        view.inbound.begin(request.number, request.oldest)
        try:
            await self._settler.take_settled(view, request.stuck)
        finally:
            view.inbound.end(request.number)
        return Done()

    async def _ask_committed(self, request: AskCommitted, _: Sequence[memoryview]) -> Message:
        view = self.serving_view(request.chain_version)
        if not view.is_tail:
            raise StaleRouting("this replica is not the tail of its chain")
        versions = await self._committed(view, request.chunks)
        self.serving_view(request.chain_version)
        return CommittedVersions(versions)

    async def _list_versions(self, request: ListVersions, _: Sequence[memoryview]) -> Message:
        self._view(request.chain_version)
        rows = await self.engine.versions(request.after, request.limit)
        return ChunkVersions(rows, self.engine.floor)

    async def _install(self, request: Install, buffers: Sequence[memoryview]) -> Message:
        updates = [
            Update(
                row.chunk,
                Action.REMOVE if row.removed else Action.REPLACE,
                0,
                payload,
                row.version,
                row.chain_version,
                Request(*name),
                granule_log2,
            )
            for row, name, granule_log2, payload in zip(
                request.chunks, request.requests, request.granules_log2, buffers, strict=True
            )
        ]
        chunks = [row.chunk for row in request.chunks]
        await self._while_syncing(request, chunks, lambda: self.passer.install(updates))
        return Done()

    async def _drop(self, request: Drop, _: Sequence[memoryview]) -> Message:
        await self._while_syncing(request, request.chunks, lambda: self.engine.forget(request.chunks))
        return Done()

    async def _install_requests(self, request: InstallRequests, _: Sequence[memoryview]) -> Message:
        await self._while_syncing(request, [], lambda: self.engine.install_requests(request.rows, request.floor))
        return Done()

    async def _sync_done(self, request: SyncDone, _: Sequence[memoryview]) -> Message:
        async def note() -> None:
            assert self.view is not None
            self.view.synced = True

        await self._while_syncing(request, [], note)
        return Done()

    async def _while_syncing(
        self,
        request: Install | Drop | InstallRequests | SyncDone,
        chunks: Sequence[bytes],
        work: Callable[[], Awaitable[object]],
    ) -> None:
        """Do `work` under the locks of `chunks`, if we are the syncing replica and the call is no late copy."""
        view = self._view(request.chain_version)
        if not view.is_syncing:
            raise StaleRouting("this replica is not syncing")
        passing = view.inbound.begin(request.number, request.oldest)
        try:
            await self.locks.acquire(chunks)
            try:
                if view is not self.view or passing.given_up.done():
                    raise UpdateUnknown("given up by the predecessor, or the chain changed")
                await work()
            finally:
                self.locks.release(chunks)
        finally:
            view.inbound.end(request.number)


def _is_open(state: ChunkState | None, view: View) -> bool:
    """Something is pending since an older chain version: an old tail may have committed it."""
    return state is not None and 0 < state.pending_chain_version < view.version
