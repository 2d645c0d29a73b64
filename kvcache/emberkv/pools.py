"""The namespaces that a server serves: each a directory under the root, opened when somebody first asks for it.

Opening one waits for the owner before to be silent, and goes on when who asked is tired of waiting.

Does not know: clients.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping

import msgspec
from emberfs import Corruption, NotFound
from emberfs.errors import LimitExceeded, Unavailable
from emberfs.runtime import Runtime
from emberfs.waiting import pause

from .counts import ServiceCounts
from .errors import NamespaceMismatch
from .events import EventFeed
from .files import Files
from .namespace import Namespace
from .pool import Pool
from .room import Room
from .space import SpaceConfig

log = logging.getLogger("emberline.kv")

NAMESPACES_MAX = 64
"""Each has a capacity of its own; what the store has left they share."""
LOOK_S = 5.0
"""So often the store is asked what it has left."""
AGAIN_S = 5.0
"""A namespace that cannot be opened is tried again after so long."""


class Pools:
    """See the module. `address` is where others reach whoever serves them."""

    def __init__(
        self, files: Files, runtime: Runtime, *, root: str, config: SpaceConfig, namespaces_max: int,
        counts: ServiceCounts, events: EventFeed | None, address: str,
    ) -> None:  # fmt: skip
        self.address = address
        self.config = config
        self._files, self._runtime, self._root = files, runtime, root.rstrip("/")
        self._namespaces_max, self._counts, self._events = namespaces_max, counts, events
        self._open: dict[str, Pool] = {}
        self._opening: dict[str, asyncio.Task[Pool]] = {}
        """Namespaces that are being taken over: that goes on when who asked for it is tired of waiting."""
        self._failed: dict[str, tuple[float, Exception]] = {}
        """Namespaces that could not be opened: until when they are not tried again, and why."""
        self._room = Room()
        self._is_told = True
        """What the store has left was told when it was asked."""
        self._looking: asyncio.Task[None] | None = None
        self._looks: set[asyncio.Task[None]] = set()
        """Those of namespaces that are opened."""
        self._asked = self._told = 0
        """How often the store was asked, and by which question is known what is known."""
        self._is_closing = False

    @property
    def opened(self) -> Mapping[str, Pool]:
        """By name."""
        return self._open

    @property
    def opening(self) -> list[str]:
        """Names of those that are being taken over."""
        return list(self._opening)

    def named(self, name: str) -> Pool:
        """Raises NotFound: it is not open here."""
        if name not in self._open:
            raise NotFound(f"no namespace {name!r} is open here; there are {', '.join(self._open) or 'none'}")
        return self._open[name]

    async def get(self, namespace: Namespace) -> Pool:
        """Opened if need be. Raises NamespaceMismatch, LimitExceeded, Unavailable, Corruption."""
        name = namespace.name
        pool = self._open.get(name)
        if self._is_closing:
            raise Unavailable("this server ends: another one takes over")
        if pool is None or pool.is_lost:
            again_s, error = self._failed.get(name, (0.0, None))
            if error is not None and self._runtime.now_s() < again_s:
                raise error
            opening = self._opening.get(name)
            if opening is None:
                opening = self._opening[name] = self._runtime.spawn(self._take_over(namespace), f"kv-open-{name}")
            pool = await asyncio.shield(opening)
        if pool.namespace != namespace:
            raise NamespaceMismatch(f"{name} is another namespace here")
        return pool

    async def open_all(self) -> list[str]:
        """Open every namespace that is there. Their names."""
        names = []
        for name in await self._files.names(self._root):
            with contextlib.suppress(NotFound):
                data = await self._files.get(self._description(name))
                await self.get(msgspec.json.decode(data, type=Namespace))
                names.append(name)
        return names

    async def elsewhere(self) -> list[str]:
        """Names of namespaces that are not open here, or not any more: another server has them, or will."""
        names = {*await self._files.names(self._root), *self._opening}
        closed = sorted(name for name in names if name not in self._open or self._open[name].is_lost)
        return [name for name in closed if name in self._opening or await self._files.exists(self._description(name))]

    async def close(self) -> None:
        """Let every namespace go."""
        self._is_closing = True
        ending = [*self._opening.values(), *self._looks, *([self._looking] if self._looking else [])]
        for task in ending:
            task.cancel()
        if ending:
            await asyncio.wait(ending)
        while self._open:
            _, pool = self._open.popitem()
            await pool.close()

    async def _take_over(self, namespace: Namespace) -> Pool:
        name = namespace.name
        directory = f"{self._root}/{name}"
        try:
            if (lost := self._open.pop(name, None)) is not None:
                await lost.close()
            await self._describe(namespace)
            self._open[name] = pool = await Pool.open(
                self._files, self._runtime, directory, namespace, config=self.config, address=self.address,
                counts=self._counts.namespace(name),
            )  # fmt: skip
            self._failed.pop(name, None)
            if self._events is not None:
                self._events.follow(pool)
            if self._looking is None:
                self._looking = self._runtime.spawn(self._keep_looking(), "kv-room")
            # Before its first put, unless the store takes its time.
            looking = self._runtime.spawn(self._look(), "kv-look")
            self._looks.add(looking)
            looking.add_done_callback(self._looks.discard)
            await pause(self._runtime, LOOK_S, looking)
            return pool
        except Exception as error:
            failure = error
            if isinstance(error, ValueError | NotFound):
                failure = Corruption(f"the index of {name}: {error}; see emberline kv rebuild")
            now_s = self._runtime.now_s()
            self._failed = {other: held for other, held in self._failed.items() if held[0] > now_s}
            self._failed[name] = now_s + AGAIN_S, failure
            raise failure from error
        finally:
            del self._opening[name]

    async def _keep_looking(self) -> None:
        while True:
            await self._runtime.sleep(LOOK_S)
            await self._look()

    async def _look(self) -> None:
        """How much more the store takes: each namespace may have a share of it."""
        self._asked = number = self._asked + 1
        try:
            free_bytes, used_bytes = map(int, await self._files.space())
        except Exception as error:  # What was known goes on to count.
            if self._is_told:
                log.warning("the store does not say how much it has left: %s", error)
            self._is_told = False
            return
        self._is_told = True
        if number < self._told:
            return
        self._told = number
        served = {name: pool for name, pool in self._open.items() if not pool.is_lost}
        held = {name: pool.space.held_bytes for name, pool in served.items()}
        limits = self._room.share(free_bytes, used_bytes, held)
        for name, pool in served.items():
            movable_bytes = free_bytes // 2 * (held[name] + 1) // (sum(held.values()) + len(held))
            pool.space.heed(limits[name], movable_bytes)

    def _description(self, name: str) -> str:
        return f"{self._root}/{name}/namespace.json"

    async def _describe(self, namespace: Namespace) -> None:
        path = self._description(namespace.name)
        try:
            there = msgspec.json.decode(await self._files.get(path), type=Namespace)
        except NotFound:
            if len(await self._files.names(self._root)) >= self._namespaces_max:
                raise LimitExceeded(
                    f"{namespace.name} is new, and there are {self._namespaces_max} namespaces: remove one's directory "
                    "under the service's root, or serve with more"
                ) from None
            await self._files.put(path, msgspec.json.encode(namespace))
            return
        if there != namespace:
            raise NamespaceMismatch(f"{namespace.name} is another namespace here")
