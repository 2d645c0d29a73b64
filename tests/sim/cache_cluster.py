"""KV-cache servers and their clients in the simulated cluster: the product's service on the product's store.

    servers = [CacheServer(cluster, name, ledger) for name in ("ka", "kb")]
    servers[0].start()
    cache = CacheClient(await cluster.client("w"), [each.address for each in servers])
    await cache.put(keys, durable=True)

A server is a process of its own whose files are `StoreFiles` of an `AsyncClient` on the simulated network. The public
client (`KVCache`) blocks threads, which no simulation has: `CacheClient` asks what it asks, and leaves to the product
how pages are laid into a segment (`writing`), and how a page that was read is checked (`reading`).

Does not know: what is right (see `cache_ledger`), or when anything dies.
"""

from __future__ import annotations

import asyncio
import contextlib
from array import array
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

from emberfs.client.aio import AsyncClient
from emberfs.client.batch import note_sums
from emberfs.client.core import Core
from emberfs.client.handle import AsyncFile
from emberfs.cluster.space import space_of
from emberfs.errors import DeadlineExceeded, EmberError, NotFound, Unavailable
from emberfs.testing.sim.cluster import RESTART_S, SimClient, SimCluster
from emberfs.testing.sim.process import SimProcess
from emberkv import messages
from emberkv.errors import SeatGone
from emberkv.files import StoreFiles
from emberkv.keys import ROOT, page_keys
from emberkv.messages import A
from emberkv.namespace import Kind, Namespace
from emberkv.page import places_of
from emberkv.pool import Pool
from emberkv.puts import STATES, STORED
from emberkv.reading import PageReader
from emberkv.service import KvService
from emberkv.space import SpaceConfig
from emberkv.writing import Part, _Slab

T = TypeVar("T")

NAMESPACE = Namespace(model="m", dtype="bf16", layout="mla", page_tokens=1, kinds=(Kind("kv"),))
TENANT = "acme"
ROOT_DIRECTORY = "/kv"
DIRECTORY = f"{ROOT_DIRECTORY}/{NAMESPACE.name}"
PAGE_BYTES = 16_000
"""Four to a segment."""
CAPACITY_BYTES = 1 << 20
TURN_S = 2.0
TIMEOUT_S = 12.0
RETRY_S = 0.05


def chain(prompt: int, pages: int) -> list[bytes]:
    """Keys of a prompt that begins like no other."""
    return page_keys(NAMESPACE, [prompt, *range(pages - 1)], tenant=TENANT)


def content(key: bytes, length: int = PAGE_BYTES) -> bytes:
    """What the page of a key holds, whoever puts it."""
    return (key * (length // len(key) + 1))[:length]


# ---- the store, awaited


class _Attachment:
    """What an `AsyncClient` has of a store: `attachment.Attachment`, its store and the portal to it, in one."""

    url = "ember://simulated:1"

    def __init__(self, client: SimClient) -> None:
        self.store = self.portal = self
        self.closed = self.forked = False
        self._process, self._core, self._routes = client.process, client.core, client.routes
        client.process.on_death(self._die)

    def _die(self) -> None:
        self.forked = True  # The files that it had open are nobody's: there is nothing to give up, nor to warn of.

    def live(self) -> Core:
        return self._core

    async def space(self) -> dict[str, int]:
        return space_of(await self._routes.status())

    async def run_async(self, call: Coroutine[Any, Any, T], *, mutates: bool = False) -> T:
        """As the portal does it: what has begun goes on to its end, whoever is tired of waiting."""
        task = self._process.spawn(call, "call")
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            while not task.done():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait([task])
            raise


def door(client: SimClient) -> AsyncClient:
    """The awaitable door of a client process to the store."""
    opened = AsyncClient.__new__(AsyncClient)
    opened._attachment = _Attachment(client)  # type: ignore[assignment]
    return opened


# ---- servers


class Feed(Protocol):
    """Is told of each pool as it begins to serve; see `events.EventFeed`."""

    tells_tokens: bool

    def follow(self, pool: Pool) -> None: ...


class CacheServer:
    """A host that runs a KV-cache server, which serves or stands by: `start` and `kill`, any number of times."""

    def __init__(self, cluster: SimCluster, name: str, feed: Feed) -> None:
        self.cluster, self.name, self.feed = cluster, name, feed
        self.address = f"{name}:1"
        self.client: SimClient | None = None
        self.service: KvService | None = None
        self._starts = 0

    @property
    def host(self) -> str:
        """Of its process: another one after each start."""
        return f"{self.name}-{self._starts}"

    @property
    def process(self) -> SimProcess:
        assert self.client is not None
        return self.client.process

    @property
    def is_up(self) -> bool:
        return self.client is not None and self.process.is_alive

    @property
    def pool(self) -> Pool | None:
        """The namespace, as it serves it; None: it does not, as far as it knows."""
        if not self.is_up or self.service is None:
            return None
        pool = self.service.pools.opened.get(NAMESPACE.name)
        return None if pool is None or pool.is_lost else pool

    def start(self) -> None:
        """Boot it. It serves, or stands by, some time later."""
        assert not self.is_up
        self._starts += 1
        self.service = None
        self.client = SimClient(self.cluster, self.host)
        self.process.spawn(self._boot(self.client), "boot")

    def kill(self) -> None:
        """kill -9."""
        if self.client is not None:
            self.client.kill()

    async def _boot(self, client: SimClient) -> None:
        process = client.process
        await _until_done(process, client.routes.start)
        self.service = KvService(
            StoreFiles(door(client)), process, root=ROOT_DIRECTORY, store="", address=self.address,
            config=SpaceConfig(capacity_bytes=CAPACITY_BYTES), events=self.feed,  # type: ignore[arg-type]
        )  # fmt: skip
        await client.network.serve(self.address, self.service)
        self.service.start()
        await _until_done(process, self.service.pools.open_all)


async def _until_done(process: SimProcess, start: Callable[[], Coroutine[Any, Any, Any]]) -> None:
    while True:
        try:
            await start()
            return
        except EmberError:
            await process.sleep(RESTART_S)


# ---- clients


class Hit(NamedTuple):
    """What a match found."""

    keys: list[bytes]
    places: bytes
    tenant: int
    lease: int
    reason: str


class CacheClient:
    """A client process of the cache. Its calls raise what `KVCache`'s raise."""

    def __init__(self, client: SimClient, addresses: Sequence[str]) -> None:
        self.client, self.process = client, client.process
        self.addresses = list(addresses)
        """The first one is asked first."""
        self.store = door(client)
        self._seat: messages.Opened | None = None
        self._segments = f"{DIRECTORY}/segments"
        self._blocking = _Blocking()
        self._reader = PageReader(self._blocking, self._segments)  # type: ignore[arg-type]
        self._file: tuple[int, AsyncFile] | None = None
        """The segment that was written to last."""

    # ---- the service, as `Caller` asks it

    async def seated(self) -> messages.Opened:
        if self._seat is None:
            self._seat = await self.call(messages.Open(NAMESPACE, TENANT), messages.Opened)
        return self._seat

    async def ask(self, make: Callable[[int], messages.Ask], answer: type[A]) -> A:
        """One request of our seat; once more if the service has forgotten it."""
        try:
            return await self.call(make((await self.seated()).seat), answer)
        except SeatGone:
            self._seat = None
        return await self.call(make((await self.seated()).seat), answer)

    async def call(self, ask: messages.Ask, answer: type[A]) -> A:
        """One request, of whichever address serves it."""
        ends_s = self.process.now_s() + TIMEOUT_S
        while (left_s := ends_s - self.process.now_s()) > 0:
            connection = self.client.network.connection(self.addresses[0])
            wait_s = left_s if len(self.addresses) == 1 else min(left_s, TURN_S)
            try:
                return await messages.send(connection.call, ask, answer, timeout_s=wait_s)
            except Unavailable:
                self.addresses.append(self.addresses.pop(0))
                await self.process.sleep(RETRY_S)
        raise DeadlineExceeded(f"no answer within {TIMEOUT_S:g} s")

    # ---- pages

    async def put(self, keys: Sequence[bytes], *, parent: bytes = ROOT, durable: bool = True) -> list[str]:
        """What became of each page."""
        try:
            return await self._put(keys, [parent, *keys[:-1]], durable)
        except (NotFound, SeatGone):  # The service, or a segment, is another one by now.
            return await self._put(keys, [parent, *keys[:-1]], durable)

    async def _put(self, keys: Sequence[bytes], parents: Sequence[bytes], durable: bool) -> list[str]:
        lengths = [PAGE_BYTES] * len(keys)
        answer = await self.ask(
            lambda seat: messages.Reserve(seat, 0, b"".join(keys), b"".join(parents), lengths, durable),
            messages.Reserved,
        )
        wanted = [index for index, state in enumerate(answer.states) if state == STORED]
        if wanted:
            seat = await self.seated()
            mine = [keys[index] for index in wanted]
            part = Part(
                reservation=answer.reservation, seat=seat.seat, keys=mine, parents=[parents[index] for index in wanted],
                places=places_of(answer.places), payloads=[memoryview(content(key)) for key in mine], kind=0,
                tenant=seat.number, is_durable=durable,
            )  # fmt: skip
            await self._write(part)
        return [STATES[state] for state in answer.states]

    async def _write(self, part: Part) -> None:
        slab = _Slab(memoryview(bytearray(part.size_bytes)))
        slab.copy(part)
        for segment, offset, begin, end in slab.runs:
            item = (await self._segment(segment), offset, slab.memory[begin:end])
            await self.store.batch_write([item], whole_chunks=True)
        ask = messages.Commit(part.seat, [part.reservation], [slab.parts[0].crcs], part.is_durable)
        if (await self.call(ask, messages.Committed)).gone:
            raise NotFound("pages came too late: put them again")

    async def _segment(self, number: int) -> AsyncFile:
        if self._file is None or self._file[0] != number:
            await self.let_go()
            self._file = (number, await self.store.open(f"{self._segments}/{number:08x}", "r+b"))
        return self._file[1]

    async def let_go(self) -> None:
        """Close the segment that was written to last."""
        if self._file is not None:
            (_, file), self._file = self._file, None
            with contextlib.suppress(EmberError):
                await file.close()

    async def flush(self) -> None:
        await self.ask(messages.Flush, messages.Okay)

    async def match(self, keys: Sequence[bytes], *, lease_s: float = 0.0) -> Hit:
        """The longest usable prefix of a chain."""
        answer = await self.ask(lambda seat: messages.Match(seat, [b"".join(keys)], lease_s), messages.Matched)
        tenant = (await self.seated()).number
        (pages,), (lease,), (reason,) = answer.pages, answer.leases, answer.reasons
        return Hit(list(keys[:pages]), answer.places[0], tenant, lease, reason)

    async def read(self, hit: Hit) -> tuple[list[bytes | None], bool]:
        """(the pages of a hit, None for a miss; nobody served some of them)."""
        views = [memoryview(bytearray(place.length)) for place in places_of(hit.places)]
        self._blocking.answers.clear()
        while True:
            try:
                done = self._reader.read(hit.keys, hit.places, views, kind=0, tenant=hit.tenant)
            except _Wanted as wanted:
                self._blocking.answers[wanted.what] = await wanted.answer(self.store)
            else:
                pages = [bytes(view) if good else None for view, good in zip(views, done, strict=True)]
                return pages, self._blocking.is_away


class _Wanted(BaseException):
    """A blocking call that has no answer yet."""

    def __init__(self, what: tuple[str, str], call: Callable[[AsyncClient], Coroutine[Any, Any, Any]]) -> None:
        super().__init__(what)
        self.what, self._call = what, call

    async def answer(self, store: AsyncClient) -> Any:
        try:
            return await self._call(store)
        except EmberError as error:
            return error


class _Blocking:
    """A blocking client for `PageReader`, which is run again and again until all that it asks for is answered."""

    def __init__(self) -> None:
        self.answers: dict[tuple[str, str], Any] = {}

    @property
    def is_away(self) -> bool:
        """Some answer was that nobody could say."""
        errors = [each for answer in self.answers.values() for each in (answer if type(answer) is list else [answer])]
        return any(isinstance(each, EmberError) and not isinstance(each, NotFound) for each in errors)

    def buffer(self, size: int) -> memoryview:
        return memoryview(bytearray(size))

    def open(self, path: str, mode: str) -> AsyncFile:
        return self._answer(("open", path), lambda store: store.open(path, mode))  # type: ignore[no-any-return]

    def batch_read(self, items: Sequence[Any], into: Any, *, raise_errors: bool, sums: array[int]) -> list[Any]:
        counts: list[Any] = self._answer(
            ("read", ""), lambda store: store.batch_read(items, into, raise_errors=raise_errors)
        )
        note_sums(sums, into, counts)
        return counts

    def _answer(self, what: tuple[str, str], call: Callable[[AsyncClient], Coroutine[Any, Any, Any]]) -> Any:
        if what not in self.answers:
            raise _Wanted(what, call)
        if isinstance(self.answers[what], EmberError):
            raise self.answers[what]
        return self.answers[what]
