"""What the service does unasked: garbage at intervals, and what the dead have left.

Of several servers on one KV one does it all, as long as it holds a claim (`claims`); the others wait for that. Two at
it at the same time, which a server that was stopped may cause, do some of it twice, without harm.

Does not know: what there is to do.
"""

from __future__ import annotations

import asyncio
import logging

from ..errors import EmberError
from ..messages import CollectGarbage
from . import grants, recovery
from .claims import Claim, Claims
from .gc import collect_garbage
from .state import SETTINGS_POLL_S, MetaState

log = logging.getLogger("emberline.meta")


async def run(state: MetaState) -> None:
    """One server: a sweep, then garbage at intervals. Cancel it only while it rests."""
    while not state.background.stopping:
        try:
            await recovery.sweep(state)
            await collect_garbage(state, CollectGarbage(force=False))
        except (EmberError, OSError) as error:
            # A full or failing disk must not end the garbage collection of a store that is used again later.
            log.warning("garbage collection: %s; trying again in %.0f s", error, state.config.gc_interval_s)
        await _rest(state, state.config.gc_interval_s)


async def run_shared(state: MetaState) -> None:
    """Several servers: be the one who does it, or wait for that. Cancel it only while it rests."""
    assert isinstance(state.claims, Claims)
    while not state.is_configured and not state.background.stopping:
        await _rest(state, SETTINGS_POLL_S)
    while not state.background.stopping:
        state.background.resting = True
        try:
            async with state.claims.of("background") as claim:
                state.background.resting = False
                await _lead(state, claim)
                state.background.resting = True
        except (EmberError, OSError) as error:
            log.warning("background work: %s", error)
            await _rest(state, state.config.clients_interval_s)


async def _lead(state: MetaState, claim: Claim) -> None:
    collected_s = float("-inf")
    while claim.is_held and not state.background.stopping:
        now_s = state.runtime.now_s()
        try:
            await recovery.end_clients(state)
            if now_s - collected_s >= state.config.gc_interval_s:
                await recovery.finish_truncates(state)
                await grants.clear(state)
                await collect_garbage(state, CollectGarbage(force=False))
                collected_s = now_s
        except (EmberError, OSError) as error:
            log.warning("background work: %s; trying again", error)
        await _rest(state, state.config.clients_interval_s)


async def _rest(state: MetaState, seconds: float) -> None:
    if not state.background.stopping:
        state.background.resting = True
        await state.runtime.sleep(seconds)
        state.background.resting = False


async def end(state: MetaState, task: asyncio.Task[None] | None) -> None:
    """Stop all of it, and wait until it has ended."""
    state.background.stopping = True
    if task is not None:
        if state.background.resting:
            task.cancel()
        await _ended(task)
    if state.background.sweeper is not None:
        await _ended(state.background.sweeper)
    state.background.sweeper = None


async def _ended(task: asyncio.Task[None]) -> None:
    """Wait for a cancelled task."""
    try:
        await task
    except asyncio.CancelledError:
        pass
