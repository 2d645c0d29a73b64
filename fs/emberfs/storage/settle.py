"""Settling: nothing that was pending when the chain changed, or that a failed call left, stays so.

The head does it. It forwards all that it holds pending since an older chain version as replacements, and commits it;
then it says `Settled` down the chain. What a later replica holds beyond that was never vouched for by those before it:
nobody has committed it, and it is dropped there. (It must not be committed instead: the head may have lost its own copy
in a power failure, and would serve the version before.)

What the head could not bring, because the successor's disk is full or its own copy is damaged, does not keep the rest:
`Settled` names it as *stuck*, everybody keeps what they have of it, and the head goes on trying.

Does not know: leases, sessions, or why a call failed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ..errors import Corruption, EmberError, UpdateUnknown
from ..messages import Settled
from ..runtime import Runtime
from ..waiting import finish, first_of, pause
from .config import StorageConfig
from .passing import REFUSED
from .view import View

if TYPE_CHECKING:
    from .replica import Replica

PAGE_CHUNKS = 256
BATCH_BYTES = 8 << 20
"""Contents that one Forward carries; one chunk may be larger."""
STUCK_RETRY_S = 2.0
"""The pause after an attempt that settled nothing grows up to this: each sends the whole content again."""


class Settler:
    """Settles one target's pending versions, in the background."""

    def __init__(self, replica: Replica, runtime: Runtime, *, config: StorageConfig) -> None:
        self._replica = replica
        self._runtime = runtime
        self._config = config
        self._tasks: list[asyncio.Task[None]] = []
        self._left: dict[bytes, None] = {}
        """Chunks that a call of this chain version left pending."""
        self._wake = runtime.future()

    def begin(self, view: View) -> None:
        """The chain has changed to `view`."""
        self._left.clear()
        self._tasks = [task for task in self._tasks if not task.done()]
        if view.is_head:
            self._tasks.append(self._runtime.spawn(self._lead(view), "settle"))

    async def close(self) -> None:
        """Return once nothing runs. The view's `changed` is done already."""
        for task in self._tasks:
            await task

    def order(self, chunks: Sequence[bytes]) -> None:
        """Settle `chunks` soon: a call that made them pending has failed."""
        self._left.update(dict.fromkeys(chunks))
        finish(self._wake)

    # --- the head --------------------------------------------------------------------------------------------------

    async def _lead(self, view: View) -> None:
        due_s = self._runtime.now_s() + self._config.forward_wait_s
        stuck: list[bytes] = []
        while not view.changed.done():
            failed = await self._settle_all(view)
            stuck = list(failed)
            if all(isinstance(error, REFUSED) for error in failed.values()) or self._runtime.now_s() >= due_s:
                break
            await pause(self._runtime, self._config.retry_s, view.changed)
        if view.changed.done():
            return
        finish(view.settled)
        while view.link is not None and not view.has_syncing_successor and not view.changed.done():
            try:
                await _say_settled(view, stuck)
                break
            except EmberError:
                await pause(self._runtime, self._config.retry_s, view.changed)
        await self._settle_left(view)

    async def _settle_left(self, view: View) -> None:
        """Settle what `order` names, until the chain changes."""
        pause_s = self._config.retry_s
        while not view.changed.done():
            self._wake = self._runtime.future()
            if not self._left:
                await first_of(self._runtime, self._wake, view.changed)
            if view.changed.done():
                return  # What is left is another view's by now.
            left = list(self._left)
            self._left.clear()
            failed = await self._settle(view, left)
            if failed:
                await pause(self._runtime, pause_s, view.changed)
            is_stuck = len(failed) == len(left)
            pause_s = min(2 * pause_s, STUCK_RETRY_S) if is_stuck else self._config.retry_s

    async def _settle_all(self, view: View) -> dict[bytes, EmberError]:
        """Settle what is pending since older versions. Returns what could not be, and why."""
        after = b""
        failed: dict[bytes, EmberError] = {}
        while not view.changed.done():
            page = await self._replica.engine.pending(after, PAGE_CHUNKS)
            if not page:
                break
            after = page[-1]
            states = await self._replica.engine.states(page)
            old = [
                (chunk, state.pending_length)
                for chunk, state in zip(page, states, strict=True)
                if state is not None and (state.damaged or 0 < state.pending_chain_version < view.version)
            ]
            for batch in _batches(old):
                failed |= await self._settle(view, batch)
        return failed

    async def _settle(self, view: View, chunks: Sequence[bytes]) -> dict[bytes, EmberError]:
        """Returns those of `chunks` that could not be settled, and why; they are tried again later."""
        await self._replica.locks.acquire(chunks)
        try:
            if view is not self._replica.view:
                return {chunk: UpdateUnknown("the chain has changed") for chunk in chunks}
            await self._check_rows(view, chunks)
            await self._replica.passer.bring(view, chunks)
        except EmberError as error:
            if len(chunks) == 1:
                self._left.update(dict.fromkeys(chunks))
                return dict.fromkeys(chunks, error)
        else:
            return {}
        finally:
            self._replica.locks.release(chunks)
        # One of them may be at fault: it must not keep the others.
        failed: dict[bytes, EmberError] = {}
        for chunk in chunks:
            failed |= await self._settle(view, [chunk])
        return failed

    async def _check_rows(self, view: View, chunks: Sequence[bytes]) -> None:
        """Raises Corruption for a damaged row that nobody can repair: it may have named what the others hold."""
        for chunk, state in zip(chunks, await self._replica.engine.states(chunks), strict=True):
            if state is not None and state.damaged and not await self._replica.repairer.repair(view, chunk):
                raise Corruption("the row of a chunk is damaged: it is not known whether something of it is pending")

    # --- the others ------------------------------------------------------------------------------------------------

    async def take_settled(self, view: View, stuck: Sequence[bytes]) -> None:
        """The predecessor has brought all it had but `stuck`: drop what it did not bring, and tell the successor."""
        kept, after = set(stuck), b""
        while not view.settled.done():
            page = await self._replica.engine.pending(after, PAGE_CHUNKS)
            for chunk in page:
                if chunk not in kept:
                    await self._drop(view, chunk)
            if not page:
                finish(view.settled)
                view.brought.clear()
            else:
                after = page[-1]
        if view.link is not None and not view.has_syncing_successor:
            await _say_settled(view, stuck)

    async def _drop(self, view: View, chunk: bytes) -> None:
        engine = self._replica.engine
        async with self._replica.locks.of(chunk):
            if view is not self._replica.view:
                raise UpdateUnknown("the chain has changed")
            (state,) = await engine.states([chunk])
            if state is not None and 0 < state.pending_chain_version < view.version and chunk not in view.brought:
                await engine.discard([chunk], [state.pending_version])


async def _say_settled(view: View, stuck: Sequence[bytes]) -> None:
    assert view.link is not None
    chain, version = view.chain.id, view.version
    await view.link.call(lambda number, oldest: Settled(chain, version, number, oldest, list(stuck)))


def _batches(chunks: Sequence[tuple[bytes, int]]) -> Iterator[list[bytes]]:
    """(chunk, length) in groups of at most BATCH_BYTES."""
    batch: list[bytes] = []
    size = 0
    for chunk, length in chunks:
        if batch and size + length > BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(chunk)
        size += length
    if batch:
        yield batch
