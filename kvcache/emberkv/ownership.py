"""Who serves a namespace: one process at a time, by files that are made once.

    owner/00000007    made by the process that took over as the seventh; nobody else can make it
    owner/beat        what the owner says again and again, so that others see that it lives

An owner is over as soon as the file after its own is there. It looks after each write to its journal and before it
acknowledges: what was acknowledged was therefore written before its successor began to read. No clock decides that; one
only decides when a successor tries.

Source: leases with fencing by epoch, as in DESIGN.md, section 4.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import msgspec
from emberfs import AlreadyExists, NotFound
from emberfs.errors import EmberError, Unavailable
from emberfs.runtime import Runtime

from .errors import StaleOwner
from .files import Files

log = logging.getLogger("emberline.kv")

LEASE_S = 2.0
"""An owner whose beat does not change for so long, by the clock of who watches, is taken for dead. Nothing it does
takes its loop for more than some tenths of that; a takeover takes no more than five seconds in all."""
BEAT_S = 0.25
QUIET_S = 0.6
"""After so long it may be dead: who stands by begins to prepare."""


class _Beat(msgspec.Struct):
    epoch: int
    count: int
    address: str
    released: bool = False


class Ownership:
    """The right to serve a namespace, from `take` until somebody else takes it."""

    def __init__(self, files: Files, runtime: Runtime, directory: str, *, epoch: int, address: str) -> None:
        self.epoch = epoch
        self._files, self._runtime = files, runtime
        self._directory = directory
        self._address = address
        self._count = 0
        self.is_over = False

    @classmethod
    async def take(
        cls,
        files: Files,
        runtime: Runtime,
        directory: str,
        *,
        address: str,
        on_quiet: Callable[[bool], None] = lambda is_quiet: None,
        may_wait: bool = True,
    ) -> Ownership:
        """Wait until nobody serves the namespace, and take it. `on_quiet`: the owner may be dead; False: it is not.

        Raises Unavailable for one that lives, if we may not wait for its end.
        """
        while True:
            epoch = await _last_epoch(files, directory)
            if epoch:
                await _wait_for_silence(files, runtime, directory, epoch, on_quiet, may_wait=may_wait)
            mine = cls(files, runtime, directory, epoch=epoch + 1, address=address)
            try:
                await files.claim(mine._path(epoch + 1), address.encode())
            except AlreadyExists:
                continue  # Another one was quicker.
            await mine.beat()
            return mine

    def _path(self, epoch: int) -> str:
        return f"{self._directory}/{epoch:08d}"

    async def check(self) -> None:
        """Raises StaleOwner if somebody else has taken over."""
        if not self.is_over and await self._files.exists(self._path(self.epoch + 1)):
            self.is_over = True
        if self.is_over:
            raise StaleOwner("another server has taken this namespace over")

    async def beat(self, *, released: bool = False) -> None:
        """Say that we live, or that the next may take over at once."""
        self._count += 1
        beat = _Beat(self.epoch, self._count, self._address, released)
        await self._files.put(f"{self._directory}/beat", msgspec.json.encode(beat))

    async def keep(self) -> None:
        """Beat until somebody else has taken over. Raises StaleOwner."""
        while True:
            try:
                await self.check()
                await self.beat()
            except EmberError as error:
                if isinstance(error, StaleOwner):
                    raise
                # The store does not answer: whoever reaches it may take over meanwhile, and then we see it.
            await self._runtime.sleep(BEAT_S)


async def _last_epoch(files: Files, directory: str) -> int:
    return max((int(name) for name in await files.names(directory) if name.isdigit()), default=0)


async def _wait_for_silence(
    files: Files, runtime: Runtime, directory: str, epoch: int, on_quiet: Callable[[bool], None], *, may_wait: bool
) -> None:
    """Return when the beat has not changed for `LEASE_S`, or the owner of `epoch` has let go."""
    seen, since_s, is_quiet = None, runtime.now_s(), False
    while True:
        try:
            beat = msgspec.json.decode(await files.get(f"{directory}/beat"), type=_Beat)
        except (NotFound, msgspec.MsgspecError):
            beat = None
        if beat is not None and beat.released and beat.epoch == epoch:
            return
        mark = None if beat is None else (beat.epoch, beat.count)
        if mark != seen:
            if seen is None and beat is not None:
                log.info("%s is served at %s: waiting until that one ends", directory, beat.address)
            if seen is not None and beat is not None and not may_wait:
                raise Unavailable(
                    f"{directory.rpartition('/')[0]} is served at {beat.address or 'another place'}: end that"
                )
            if is_quiet:
                on_quiet(False)
            seen, since_s, is_quiet = mark, runtime.now_s(), False
        elif runtime.now_s() - since_s >= LEASE_S:
            return
        elif not is_quiet and runtime.now_s() - since_s >= QUIET_S:
            is_quiet = True
            on_quiet(True)
        await runtime.sleep(BEAT_S / 2)
