"""Chunk requests to the right replicas: what makes a cluster look like one storage service to a client.

A `StorageRouter` is a `Connection`. It cuts a request into shares, one per server (reads: any serving replica;
updates: the heads), names the chain versions it goes by, and sends a share again, by newer routing, until it is served
or the deadline is over. One that has too much to do is asked again when it said, and others before it. An update gets
a name of the router's own (session, channel, sequence, slot) and keeps it from attempt to attempt, so the replicas
apply it once.

The deadline bounds an operation, even if a server takes a call and never answers. Errors at the deadline: UpdateUnknown
if an update was ever sent without an answer, else Unavailable. A damaged replica is passed over as long as another one
has the bytes.

Does not know: files, or how a server finds out that it should not serve.
"""

from __future__ import annotations

import enum
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import msgspec

from ..errors import (
    EmberError,
    LimitExceeded,
    Overloaded,
    SessionExpired,
    StaleRouting,
    Unanswered,
    Unavailable,
    Unreachable,
    UpdateUnknown,
)
from ..messages import (
    ChunkList,
    ChunksRead,
    Done,
    ListChunks,
    Message,
    ReadChunks,
    RemoveChunks,
    TruncateChunk,
    WriteChunks,
)
from ..routing import Chain, ChainTarget
from ..runtime import Runtime
from ..transport.types import Network
from ..waiting import all_of
from .channels import Channels
from .routes import Routes

T = TypeVar("T")


_AGAIN = (StaleRouting, Unavailable, UpdateUnknown, SessionExpired)
"""Errors after which a share may be sent again."""
OVERLOAD_PAUSE_S_MAX = 4.0
"""Before another attempt at a server that has too much to do, half of it more or less."""
READ_BYTES_PER_S_MIN = 8 << 20
"""A server that sends more slowly than this is taken for silent, if another one has the bytes."""


class ReadFrom(enum.StrEnum):
    """Which replica a read asks first."""

    LOAD = "load"
    """The server with the fewest calls of ours in the air, one on this host before others; of equal ones always the
    same, which has in memory what we read before."""
    ROUND_ROBIN = "round_robin"
    HEAD = "head"
    TAIL = "tail"


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterConfig:
    """How hard a client tries."""

    deadline_s: float = 30.0
    """An operation that could not be done by then ends with an error."""
    retry_first_s: float = 0.02
    """Pause before the second attempt, unless newer routing comes sooner; doubled up to `retry_max_s`."""
    retry_max_s: float = 0.5
    read_patience_s: float = 1.0
    """A read that was not answered for so long, and the time its bytes may take, goes to a replica that was not asked
    yet. The last one is waited for."""
    suspect_s: float = 5.0
    """A server that was not reached is asked last for this long, or until it answers: longer than the cluster takes to
    find out that it is dead. Doubled with each failure up to `suspect_max_s`: only our way to it may be broken."""
    suspect_max_s: float = 60.0
    read_from: ReadFrom = ReadFrom.LOAD
    relaxed: bool = False
    """Reads take what the replica has committed, without asking the tail: it may be older than the newest write."""
    uncommitted: bool = False
    """Reads take what the replica has written: it may be newer than what is committed, and never be."""
    host: str = ""
    """This machine, as servers name theirs."""

    def __post_init__(self) -> None:
        for name in ("deadline_s", "retry_first_s", "retry_max_s", "read_patience_s", "suspect_s", "suspect_max_s"):
            if getattr(self, name) <= 0:
                raise LimitExceeded(f"{name} must be more than 0: {getattr(self, name)}")


class _Suspect(NamedTuple):
    """A server that did not answer."""

    until_s: float
    for_s: float


class Attempts:
    """The attempts of one operation."""

    def __init__(self, router: StorageRouter, client: bytes = b"") -> None:
        """`client`: the session that the operation is part of; b"": whichever we have."""
        self._router = router
        self._deadline_s = router.runtime.now_s() + router.config.deadline_s
        self._pause_s = router.config.retry_first_s
        self._refusals = 0
        """By servers with too much to do."""
        self.is_unknown = False
        """An attempt was sent and its outcome is not known."""
        self.client = client or router.routes.client
        """Whose session names the operation. A second attempt under another one would not be known as the same."""
        self._is_bound = bool(client)
        self.silent: set[str] = set()
        """Servers that were left because they did not answer."""

    async def reply(
        self, address: str, request: Message, buffers: Sequence[memoryview], *, patience_s: float | None = None
    ) -> Message:
        """One call. Raises Unreachable or UpdateUnknown if no answer comes in time (`patience_s`, the deadline), too.

        However it ends, nobody touches `buffers` any more.
        """
        router = self._router
        left_s = max(self._deadline_s - router.runtime.now_s(), 0.0)
        timeout_s = left_s if patience_s is None else min(patience_s, left_s)
        try:
            return await router.network.connection(address).call(request, buffers, timeout_s=timeout_s)
        except Unanswered:
            self.silent.add(address)
            raise

    async def after(self, error: Exception, seen_version: int) -> None:
        """Wait for a reason to try again. Raises when the time is over."""
        self.is_unknown = self.is_unknown or isinstance(error, UpdateUnknown)
        router = self._router
        if isinstance(error, SessionExpired):
            if self.is_unknown:
                raise UpdateUnknown(
                    "the session ended while a write was in the air: it may or may not have happened"
                ) from error
            await router.routes.renew(self.client)
            if self._is_bound:
                # What it had open was closed: somebody else may write there by now.
                raise error
            self.client = router.routes.client
            return
        left_s = self._deadline_s - router.runtime.now_s()
        if left_s > 0:
            await router.routes.news(seen_version, min(self._pause(error), left_s))
            left_s = self._deadline_s - router.runtime.now_s()
        if left_s <= 0:
            what = f"not done after {router.config.deadline_s:g} s; the last answer was: {error}"
            raise (UpdateUnknown(what) if self.is_unknown else Unavailable(what)) from error

    def _pause(self, error: Exception) -> float:
        """Before the next attempt."""
        pause_s = self._pause_s
        self._pause_s = min(2 * pause_s, self._router.config.retry_max_s)
        if not isinstance(error, Overloaded):
            return pause_s
        # Each at a time of its own, or all would come again at once; and later each time, or they would be too many.
        overload_s = min(error.retry_after_s * (1 << self._refusals), OVERLOAD_PAUSE_S_MAX)
        self._refusals += 1
        return overload_s * (0.5 + self._router.runtime.random_bytes(1)[0] / 255)

    def last(self, error: EmberError) -> EmberError:
        """What to raise for an error that ends the operation: an earlier attempt may have got through."""
        return UpdateUnknown(f"it may or may not have happened before this: {error}") if self.is_unknown else error


class StorageRouter:
    """The way to all chains. Give it as the connection of each chain id."""

    def __init__(
        self, runtime: Runtime, network: Network, routes: Routes, *, config: RouterConfig | None = None
    ) -> None:
        self.runtime = runtime
        self.routes = routes
        self.config = config or RouterConfig()
        self.network = network
        self._in_the_air: dict[str, int] = {}
        self._suspects: dict[str, _Suspect] = {}
        """By address: those that did not answer since they failed."""
        self._turn = 0
        self._channels = Channels()
        self._handlers: dict[type[Message], Callable[[Attempts, Any, Sequence[memoryview]], Awaitable[Message]]] = {
            ReadChunks: self._read,
            WriteChunks: self._named,
            RemoveChunks: self._named,
            TruncateChunk: self._named,
            ListChunks: self._list,
        }

    async def call(self, request: Message, buffers: Sequence[memoryview] = ()) -> Message:
        """Serve one chunk request. Raises what the replicas raise, Unavailable, UpdateUnknown, DataLost."""
        attempts = Attempts(self, request.client if isinstance(request, WriteChunks) else b"")
        return await self._handlers[type(request)](attempts, request, buffers)

    # --- reads -----------------------------------------------------------------------------------------------------

    async def _read(self, attempts: Attempts, request: ReadChunks, buffers: Sequence[memoryview]) -> Message:
        counts = [0] * len(buffers)
        errors: dict[int, tuple[str, str, int]] = {}
        damaged: dict[int, set[bytes]] = {}
        """Item -> targets whose copy is damaged."""
        left = list(range(len(buffers)))
        while left:
            version = self.routes.routing.version
            shares = self._read_shares(request, left, damaged)
            outcomes = await self._all(
                [
                    self._read_share(attempts, address, request, [item for item, _ in share], buffers)
                    for address, share in shares.items()
                ]
            )
            left, failure = [], None
            for share, outcome in zip(shares.values(), outcomes, strict=True):
                if isinstance(outcome, Exception):
                    left += [item for item, _ in share]
                    failure = outcome
                    continue
                for place, (item, target) in enumerate(share):
                    problem = outcome.errors.get(place)
                    if problem is None:
                        counts[item] = outcome.counts[place]
                        errors.pop(item, None)
                        continue
                    damaged.setdefault(item, set()).add(target)
                    errors[item] = problem
                    if any(other.target not in damaged[item] for other in self._chain_of(request, item).serving):
                        left.append(item)
            if failure is not None:
                await attempts.after(failure, version)
        return ChunksRead(counts, errors)

    def _chain_of(self, request: ReadChunks, item: int) -> Chain:
        return self.routes.chain(request.chains[item])

    def _read_shares(
        self, request: ReadChunks, items: Sequence[int], damaged: dict[int, set[bytes]]
    ) -> dict[str, list[tuple[int, bytes]]]:
        """Server -> (item, target that is asked)."""
        shares: dict[str, list[tuple[int, bytes]]] = {}
        chosen: dict[int, tuple[str, bytes]] = {}
        """Chain -> where its items without a damaged replica go: together."""
        for item in items:
            chain = request.chains[item]
            if item in damaged:
                address, target = self._choose(self._chain_of(request, item), damaged[item])
            else:
                if chain not in chosen:
                    chosen[chain] = self._choose(self._chain_of(request, item), set())
                address, target = chosen[chain]
            shares.setdefault(address, []).append((item, target))
        return shares

    def _choose(self, chain: Chain, damaged: set[bytes]) -> tuple[str, bytes]:
        """(server, target) of the replica to ask; ("", b"") if none serves now."""
        serving = [target for target in chain.serving if target.target not in damaged] or list(chain.serving)
        if not serving:
            return "", b""
        match self.config.read_from:
            case ReadFrom.HEAD:
                order = serving
            case ReadFrom.TAIL:
                order = serving[::-1]
            case ReadFrom.ROUND_ROBIN:
                self._turn += 1
                turn = self._turn % len(serving)
                order = serving[turn:] + serving[:turn]
            case ReadFrom.LOAD:
                order = sorted(self.routes.preferred(chain, serving), key=self._load)
        target = min(order, key=self._is_suspect)
        return self.routes.address(target.target), target.target

    def _load(self, target: ChainTarget) -> tuple[bool, int]:
        return self._is_far(target), self._in_the_air.get(self.routes.address(target.target), 0)

    def _is_far(self, target: ChainTarget) -> bool:
        """It is not on this host, if we know ours."""
        return bool(self.config.host) and self.routes.host(self.routes.address(target.target)) != self.config.host

    def usual(self, chain: Chain) -> list[str]:
        """The servers that a read of `chain` goes to, when nothing else is in the air: the first one before others."""
        order = sorted(self.routes.preferred(chain, chain.serving), key=self._is_far)
        return [self.routes.address(target.target) for target in sorted(order, key=self._is_suspect)]

    def _is_suspect(self, target: ChainTarget) -> bool:
        suspect = self._suspects.get(self.routes.address(target.target))
        return suspect is not None and suspect.until_s > self.runtime.now_s()

    def _suspect(self, address: str) -> None:
        """It did not answer: ask it last for a while."""
        now_s, before = self.runtime.now_s(), self._suspects.get(address)
        if before is not None and before.until_s > now_s:
            return
        for_s = self.config.suspect_s if before is None else min(2 * before.for_s, self.config.suspect_max_s)
        self._suspects[address] = _Suspect(now_s + for_s, for_s)

    async def _read_share(
        self,
        attempts: Attempts,
        address: str,
        request: ReadChunks,
        items: Sequence[int],
        buffers: Sequence[memoryview],
    ) -> ChunksRead:
        chains = [request.chains[item] for item in items]
        share = ReadChunks(
            chains,
            [request.chunks[item] for item in items],
            [request.offsets[item] for item in items],
            self._versions(chains),
            request.relaxed or self.config.relaxed,
            request.uncommitted or self.config.uncommitted,
            request.grant,
        )
        parts = [buffers[item] for item in items]
        patience_s = None
        if all(self._could_go_elsewhere(attempts, address, chain) for chain in set(chains)):
            patience_s = self.config.read_patience_s + sum(map(len, parts)) / READ_BYTES_PER_S_MIN
        reply = await self._send(attempts, address, share, buffers=parts, chains=chains, patience_s=patience_s)
        assert isinstance(reply, ChunksRead)
        return reply

    def _could_go_elsewhere(self, attempts: Attempts, address: str, chain: int) -> bool:
        """A replica of `chain` has not been silent yet, beside the one at `address`."""
        others = {self.routes.address(each.target) for each in self.routes.chain(chain).serving} - {address}
        return not others <= attempts.silent

    async def _list(self, attempts: Attempts, request: ListChunks, _: Sequence[memoryview]) -> Message:
        """Committed chunks, from the tail: what others have pending may be committed there."""
        while True:
            version = self.routes.routing.version
            chain = self.routes.chain(request.chain)
            try:
                address = self.routes.address(chain.serving[-1].target) if chain.serving else ""
                share = msgspec.structs.replace(request, chain_version=chain.version)
                reply = await self._send(attempts, address, share, chains=[request.chain])
            except (StaleRouting, Unavailable, UpdateUnknown) as error:
                await attempts.after(Unavailable(str(error)), version)
            else:
                assert isinstance(reply, ChunkList)
                return reply

    # --- updates ---------------------------------------------------------------------------------------------------

    async def _named(
        self, attempts: Attempts, request: WriteChunks | RemoveChunks | TruncateChunk, buffers: Sequence[memoryview]
    ) -> Message:
        """Run an update under a name of its own."""
        channel, sequence = self._channels.take()
        request = msgspec.structs.replace(request, channel=channel, sequence=sequence)
        try:
            if isinstance(request, TruncateChunk):
                return await self._truncate(attempts, request)
            return await self._update(attempts, request, buffers)
        finally:
            self._channels.end(channel)

    async def _update(
        self, attempts: Attempts, request: WriteChunks | RemoveChunks, buffers: Sequence[memoryview]
    ) -> Message:
        left = list(range(len(request.chunks)))
        while left:
            version = self.routes.routing.version
            shares: dict[str, list[int]] = {}
            try:
                for item in left:
                    shares.setdefault(self._head(request.chains[item]), []).append(item)
                outcomes = await self._all(
                    [
                        self._update_share(
                            attempts, address, msgspec.structs.replace(request, client=attempts.client), items, buffers
                        )
                        for address, items in shares.items()
                    ]
                )
            except EmberError as error:
                raise attempts.last(error) from error
            left, failure = [], None
            for items, outcome in zip(shares.values(), outcomes, strict=True):
                if isinstance(outcome, Exception):
                    left += items
                    # One that leaves the outcome open must not be hidden by one that does not.
                    failure = outcome if not isinstance(failure, UpdateUnknown) else failure
            if failure is not None:
                await attempts.after(failure, version)
                left.sort()
        return Done()

    async def _update_share(
        self,
        attempts: Attempts,
        address: str,
        request: WriteChunks | RemoveChunks,
        items: Sequence[int],
        buffers: Sequence[memoryview],
    ) -> Message:
        chains = [request.chains[item] for item in items]
        slots = [request.slots[item] for item in items] if request.slots else list(items)
        chunks = [request.chunks[item] for item in items]
        share: Message
        if isinstance(request, RemoveChunks):
            share = msgspec.structs.replace(
                request,
                chains=chains,
                chunks=chunks,
                chain_versions=self._versions(chains),
                slots=slots,
                versions=[request.versions[item] for item in items] if request.versions else [],
            )
        else:
            share = msgspec.structs.replace(
                request,
                chains=chains,
                chunks=chunks,
                offsets=[request.offsets[item] for item in items],
                chain_versions=self._versions(chains),
                slots=slots,
            )
        parts = [buffers[item] for item in items] if buffers else ()
        return await self._send(attempts, address, share, buffers=parts, chains=chains)

    async def _truncate(self, attempts: Attempts, request: TruncateChunk) -> Message:
        while True:
            version = self.routes.routing.version
            share = msgspec.structs.replace(
                request, client=attempts.client, chain_version=self.routes.chain(request.chain).version
            )
            try:
                return await self._send(attempts, self._head(request.chain), share, chains=[request.chain])
            except (StaleRouting, Unavailable, UpdateUnknown, SessionExpired) as error:
                await attempts.after(error, version)
            except EmberError as error:
                raise attempts.last(error) from error

    def _head(self, chain: int) -> str:
        """The server that takes a chain's updates; "" if there is none now."""
        serving = self.routes.chain(chain).serving
        return self.routes.address(serving[0].target) if serving else ""

    # --- both ------------------------------------------------------------------------------------------------------

    def _versions(self, chains: Sequence[int]) -> list[int]:
        return [self.routes.chain(chain).version for chain in chains]

    async def _send(
        self,
        attempts: Attempts,
        address: str,
        request: Message,
        *,
        buffers: Sequence[memoryview] = (),
        chains: Sequence[int],
        patience_s: float | None = None,
    ) -> Message:
        if not address:
            raise Unavailable(f"no replica of chain {chains[0]} serves now")
        self._in_the_air[address] = self._in_the_air.get(address, 0) + 1
        try:
            reply = await attempts.reply(address, request, buffers, patience_s=patience_s)
        except Unreachable:
            self._suspect(address)
            raise
        except UpdateUnknown:
            raise  # Whether there was an answer is not known either.
        except Overloaded as error:
            self._suspects[address] = _Suspect(self.runtime.now_s() + error.retry_after_s, self.config.suspect_s / 2)
            raise
        except EmberError:
            self._suspects.pop(address, None)
            raise
        else:
            self._suspects.pop(address, None)
            return reply
        finally:
            self._in_the_air[address] -= 1

    async def _all(self, works: Sequence[Coroutine[Any, Any, T]]) -> list[T | Exception]:
        """Run coroutines side by side: their results, or the errors after which a share is sent again.

        Any other error is raised once all have ended.
        """
        if len(works) == 1:
            try:
                return [await works[0]]
            except _AGAIN as error:
                return [error]
            finally:
                del works
        outcomes = await all_of(self.runtime, works, "router-share")
        for outcome in outcomes:
            if isinstance(outcome, Exception) and not isinstance(outcome, _AGAIN):
                raise outcome
        return outcomes
