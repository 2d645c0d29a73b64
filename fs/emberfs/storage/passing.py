"""Updates on their way through one replica: prepare here and at the successor, commit once the tail has.

    head     prepares, vouches, commits when the successor has answered
    middle   the same; it vouches once it is vouched for
    tail     commits when its own prepare is durable and it is vouched for; a syncing successor gets everything first

Every function here runs under the locks of the chunks it names, and in one chain version: a change of the chain ends it
as UpdateUnknown, with what is pending left in place. A new update that the successor refuses (no space, say) is dropped
here too, from the end of the chain to the head. A replacement never is: somebody who is gone may have committed it.

Does not know: sessions, leases, or how a client is answered.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import NoReturn

from ..checksum import crc32c
from ..engine import Action, ChunkEngine, ChunkState, InstallItem, Prepared, Update
from ..errors import Corruption, EmberError, NoSpace, StaleChunk, Unavailable, UpdateUnknown
from ..messages import Forward, Forwarded, Message
from ..runtime import Runtime
from ..types import describe_chunk
from ..waiting import drop
from .forward import Abandoned, Link, Passing
from .view import View

REFUSED = (NoSpace, Corruption)
"""Errors of a successor after which neither it nor anybody after it holds anything of the call."""


class Passer:
    """Passes updates of one target on."""

    def __init__(self, engine: ChunkEngine, runtime: Runtime) -> None:
        self._engine = engine
        self._runtime = runtime

    async def pass_on(
        self, view: View, updates: Sequence[Update], *, passing: Passing | None, whole: bool = False
    ) -> list[Prepared]:
        """Prepare, hand on and commit `updates` (versions given); returns what the chunks are now.

        `passing`: how our predecessor vouches; None at the head. `whole`: each update is all of its chunk.
        Raises NoSpace, Corruption, Unavailable (nothing is held, here or behind us), UpdateUnknown.
        """
        link, number, forward = view.link, 0, None
        if link is not None and not view.has_syncing_successor:
            number = link.take_number()
            sending = link.send(number, *_forward(view, updates, whole=whole))
            forward = self._runtime.spawn(sending, "forward")
        vouching: asyncio.Task[None] | None = None
        try:
            try:
                publish = link is None and (passing is None or passing.is_vouched)
                prepared = await self._prepare(updates, whole=whole, publish=publish)
                if passing is not None:
                    await passing.vouched()
                _check(view)
            except UpdateUnknown:
                raise
            except (EmberError, Abandoned) as error:
                await self._abandon(updates, error, whole=whole, link=link, number=number, forward=forward)
            if forward is not None:
                assert link is not None
                vouching = self._runtime.spawn(link.vouch(number), "vouch")
            if link is not None:
                try:
                    await self._confirm(view, link, updates, prepared, forward=forward)
                except REFUSED:
                    _check(view)
                    if not whole:
                        await self._discard(updates)
                    raise
            _check(view)
            if not publish:
                await self._engine.commit([each.chunk for each in updates], [each.version for each in prepared])
            return prepared
        finally:
            for task in (forward, vouching):
                if task is not None:
                    drop(task)
            if forward is not None:
                assert link is not None
                link.end(number)

    async def bring(self, view: View, chunks: Sequence[bytes]) -> None:
        """Send what is pending of `chunks` on as replacements, and commit it: a head settles so."""
        _check(view)
        updates = await self.whole(chunks)
        if not updates:
            return
        if view.link is not None:
            prepared = await self._engine.summaries([each.chunk for each in updates], pending=True)
            await self._confirm(view, view.link, updates, prepared, forward=None)
            _check(view)
        await self._engine.commit([each.chunk for each in updates], [each.version or 0 for each in updates])

    async def whole(self, chunks: Sequence[bytes]) -> list[Update]:
        """What is pending of `chunks`, each as an update that goes over anything. Raises Corruption."""
        updates = []
        for chunk, state in zip(chunks, await self._engine.states(chunks), strict=True):
            if state is None or not state.pending_version:
                continue
            content = None if state.pending_removes else await self._engine.content(chunk)
            action, payload = (Action.REMOVE, memoryview(b"")) if content is None else (Action.REPLACE, content.payload)
            stamp = state.pending_version, state.pending_chain_version
            updates.append(Update(chunk, action, 0, payload, *stamp, state.request, state.granule_log2))
        return updates

    # --- here ------------------------------------------------------------------------------------------------------

    async def _prepare(self, updates: Sequence[Update], *, whole: bool, publish: bool) -> list[Prepared]:
        if not whole:
            return await self._engine.prepare(updates, publish=publish, checks_requests=False)
        here: dict[bytes, Prepared] = {}
        states = await self._engine.states([each.chunk for each in updates])
        for update, state in zip(updates, states, strict=True):
            present = await self._present(update, state)
            if present is not None:
                here[update.chunk] = present
        new = [each for each in updates if each.chunk not in here]
        if publish and here:
            await self._engine.commit(list(here), [each.version for each in here.values()])
        if new:
            prepared = await self._engine.prepare(new, publish=publish, checks_requests=False)
            here.update((update.chunk, each) for update, each in zip(new, prepared, strict=True))
        return [here[each.chunk] for each in updates]

    async def _present(self, update: Update, state: ChunkState | None) -> Prepared | None:
        """The version of `update` if we have it, pending or committed; None: not with these bytes."""
        version = update.version or 0
        if state is None or state.damaged or version > max(state.version, state.pending_version):
            return None
        if version < state.version:
            name = describe_chunk(update.chunk)
            raise StaleChunk(f"update {version} of chunk {name} is older than committed version {state.version}")
        is_pending = version > state.version
        if is_pending and version < state.pending_version:
            return None
        theirs = (0, 0) if update.action is Action.REMOVE else (len(update.payload), crc32c(update.payload))
        try:
            (ours,) = await self._engine.summaries([update.chunk], pending=is_pending)
            if (ours.length, ours.crc) == theirs:
                return ours
        except Corruption:
            pass
        if is_pending:
            return None
        (installed,) = await self.install([update])
        return installed

    async def install(self, updates: Sequence[Update]) -> list[Prepared]:
        """Make each chunk exactly that, published at once: what a syncing target does."""
        return await self._engine.install(
            [
                InstallItem(
                    each.chunk,
                    each.version or 0,
                    each.chain_version,
                    None if each.action is Action.REMOVE else each.payload,
                    each.request,
                    each.granule_log2,
                )
                for each in updates
            ]
        )

    async def _discard(self, updates: Sequence[Update]) -> None:
        """Drop what `updates` made pending here."""
        await self._engine.discard([each.chunk for each in updates], [each.version or 0 for each in updates])

    async def _abandon(
        self,
        updates: Sequence[Update],
        error: EmberError | Abandoned,
        *,
        whole: bool,
        link: Link | None,
        number: int,
        forward: asyncio.Task[Message] | None,
    ) -> NoReturn:
        """We cannot prepare `updates`, or nobody before us could: see that nobody after us holds them. Raises."""
        if forward is not None:
            assert link is not None
            vouching = self._runtime.spawn(link.vouch(number, abandoned=True), "abandon")
            try:
                await forward
            except (Unavailable, *REFUSED):
                pass
            except EmberError as unknown:
                raise UpdateUnknown(f"not prepared here, and perhaps later: {error}") from unknown
            else:
                raise UpdateUnknown(f"not prepared here, and yet committed later: {error}")
            finally:
                drop(vouching)
        if isinstance(error, Abandoned):
            if not whole:
                await self._discard(updates)
            raise Unavailable("the predecessor could not prepare it")
        raise error

    # --- the successor ---------------------------------------------------------------------------------------------

    async def _confirm(
        self,
        view: View,
        link: Link,
        updates: Sequence[Update],
        prepared: Sequence[Prepared],
        *,
        forward: asyncio.Task[Message] | None,
    ) -> None:
        """Return once the successor has exactly what we prepared.

        Raises NoSpace, Corruption (it holds nothing of an update that is new), else UpdateUnknown.
        """
        ours = [(each.length, each.crc) for each in prepared]
        try:
            reply = await forward if forward is not None else await self._send_whole(view, link, updates)
        except REFUSED:
            raise
        except EmberError as error:
            raise UpdateUnknown(f"it is not known whether the successor took it: {error}") from error
        if _contents(reply) != ours:
            # It is never committed over something else. The head settles it: with bytes that were read and verified.
            raise UpdateUnknown("the successor has other bytes")

    async def _send_whole(self, view: View, link: Link, updates: Sequence[Update]) -> Message:
        """Forward `updates` vouched for, as replacements."""
        if any(each.action not in (Action.REPLACE, Action.REMOVE) for each in updates):
            updates = await self.whole([each.chunk for each in updates])
        return await link.call(*_forward(view, updates, whole=True, vouched=True))


def _forward(
    view: View, updates: Sequence[Update], *, whole: bool, vouched: bool = False
) -> tuple[Callable[[int, int], Message], list[memoryview]]:
    """(what builds the message, its buffers)"""

    def build(number: int, oldest: int) -> Message:
        return Forward(
            view.chain.id,
            view.version,
            number,
            oldest,
            [each.chunk for each in updates],
            [each.action.value for each in updates],
            [each.offset for each in updates],
            [each.version or 0 for each in updates],
            [(*each.request,) for each in updates],
            [each.granule_log2 for each in updates],
            vouched,
            whole,
            [each.chain_version for each in updates],
            [each.room_bytes for each in updates] if any(each.room_bytes for each in updates) else [],
        )

    return build, [each.payload for each in updates]


def _contents(reply: Message) -> list[tuple[int, int]]:
    assert isinstance(reply, Forwarded)
    return list(zip(reply.lengths, reply.crcs, strict=True))


def _check(view: View) -> None:
    if view.changed.done():
        raise UpdateUnknown("the chain changed while an update was on its way")
