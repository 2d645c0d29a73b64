"""The clients of a cluster: who may change something, and what came of it, so that nothing is done twice.

A request that changes something comes as `Once`: its client's id and a number. The one transaction that makes it happen
(`decide`) also keeps its result in a row (client, number). A repeated request finds that row in its own transaction, at
whichever server, and the handler goes on from there as if it had just run it; two attempts at the same time conflict.
An error is kept as well: another attempt, or a copy that the network made, may still be on its way, and would come to
another end.

A client has one row. Its integer only grows:

    done_below      from 1: requests below were answered. Their results are deleted, and a late copy is refused.
    ENDED           its session is over: every decision reads this row, so none of its requests happens after that.
    CLEANED + s     what it left has been taken care of, at that Unix time; deleted after KEEP_S

Nobody but the cluster manager knows whose session is live. The server hands in the ids it hears of (`heard`). A client
has ended when it is missing there, after this server knew that it had lived, and is not back within `grace_s`.

Does not know: what requests do, and what a client leaves (`recovery`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import msgspec

from ..errors import EmberError, SessionExpired, StoreClosed, TargetFailed, Unavailable, UpdateUnknown
from ..kv.types import KV, Transaction, decode_int
from ..messages import Done
from ..runtime import Runtime
from ..transport.codec import decode_failure, encode_failure
from ..waiting import finish, pause
from .keys import client_key, result_key

T = TypeVar("T")
ENDED = 1 << 61
CLEANED = 1 << 62
KEEP_S = 3600
"""How long a late request of an ended client is known as such by its row."""
PRUNE_EVERY = 256
"""Every so many requests of a client its answered ones are forgotten."""
HEAR_S = 2.0
"""How long a request of a client that we have not heard of waits: its session is newer than our news, which are asked
for, or there is none."""
HEAR_POLL_S = 0.05

_RESULT, _FAILURE = b"\0", b"\1"
_UNDECIDED = (Unavailable, UpdateUnknown, SessionExpired, StoreClosed, TargetFailed)
"""Errors that say nothing about the request."""


class RequestName(NamedTuple):
    """The name under which a request is decided once."""

    client: bytes
    number: int
    done_below: int


class _UnheardOf(Exception):
    """A client of whom neither its row nor the manager has told us."""


@dataclass(slots=True)
class _Taken:
    """What a client has sent to this server."""

    attempts: dict[int, int] = field(default_factory=dict)
    """Number of a request -> its newest attempt."""
    done_below: int = 0


class Clients:
    """The clients' rows, and the news of their sessions."""

    def __init__(self, kv: KV, runtime: Runtime, ask_news: Callable[[], None]) -> None:
        """`ask_news` has `heard` called soon, if there are other sessions than the last time."""
        self._kv = kv
        self._runtime = runtime
        self._ask_news = ask_news
        self._news: asyncio.Future[None] | None = None
        self._live: frozenset[bytes] = frozenset()
        self._known: set[bytes] = set()
        """Those that live or have lived, for all that we know."""
        self._gone: dict[bytes, float] = {}
        """Known ones that are missing now -> since when."""
        self._taken: dict[bytes, _Taken] = {}
        """By client; of one that nobody ever told us of until the next news."""

    def heard(self, live: Collection[bytes]) -> None:
        """The cluster manager said, just now, that these are all live sessions."""
        self._live = frozenset(live)
        if self._news is not None:
            finish(self._news)
            self._news = None
        for client in self._known - self._live:
            self._gone.setdefault(client, self._runtime.now_s())
        for client in self._live:
            self._gone.pop(client, None)
        self._known |= self._live
        self._taken = {client: taken for client, taken in self._taken.items() if client in self._known}
        for client in [client for client, since_s in self._gone.items() if self._runtime.now_s() - since_s > KEEP_S]:
            self.forget(client)

    def has_ended(self, client: bytes, *, grace_s: float) -> bool:
        """Whether a client that has a row is gone for good. Looking makes it known."""
        self._known.add(client)
        since_s = self._gone.get(client)
        return since_s is not None and self._runtime.now_s() - since_s >= grace_s

    def take(self, name: RequestName, attempt: int) -> None:
        """An attempt begins. Raises UpdateUnknown for a copy of one that was taken here before.

        That one may have been refused, and its client have given up: then the copy must not make it happen after all.
        """
        taken = self._taken.setdefault(name.client, _Taken())
        if name.number < taken.done_below or attempt <= taken.attempts.get(name.number, 0):
            raise UpdateUnknown("a copy of an attempt that was taken already")
        taken.attempts[name.number] = attempt
        if name.done_below > taken.done_below:
            taken.done_below = name.done_below
            taken.attempts = {number: newest for number, newest in taken.attempts.items() if number >= name.done_below}

    def forget(self, client: bytes) -> None:
        """It has been taken care of."""
        self._taken.pop(client, None)
        self._known.discard(client)
        self._gone.pop(client, None)

    async def decide(
        self, name: RequestName, work: Callable[[Transaction], Awaitable[T]], kind: Any, *, reclaims: bool
    ) -> T:
        """`kv.run` of the transaction that decides a request; if it is decided already, its result.

        `kind`: the type of the result, for msgspec. Raises SessionExpired, and Unavailable for an unknown client.
        """

        async def once(txn: Transaction) -> T:
            stored = await self._stored(txn, name)
            if stored is not None:
                return _decode(stored, kind)  # type: ignore[no-any-return]
            result = await work(txn)
            txn.put(result_key(name.client, name.number), _RESULT + msgspec.msgpack.encode(result))
            if name.number % PRUNE_EVERY == 0:
                txn.max(client_key(name.client), name.done_below)
                txn.delete_range(result_key(name.client, 0), result_key(name.client, name.done_below))
            return result

        try:
            return await self._run(once, reclaims=reclaims)
        except EmberError as error:
            if isinstance(error, _UNDECIDED):
                raise
            failure = error

        async def refuse(txn: Transaction) -> bytes:
            stored = await self._stored(txn, name)
            if stored is None:
                stored = _FAILURE + encode_failure(failure, Done())
                txn.put(result_key(name.client, name.number), stored)
            return stored

        return _decode(await self._run(refuse, reclaims=True), kind)  # type: ignore[no-any-return]

    async def step(self, name: RequestName, work: Callable[[Transaction], Awaitable[T]], *, reclaims: bool) -> T:
        """`kv.run` of a part of a request that is decided later. Raises UpdateUnknown if it is decided already."""

        async def undecided(txn: Transaction) -> T:
            if await self._stored(txn, name) is not None:
                raise UpdateUnknown("another attempt has done this request to its end")
            return await work(txn)

        return await self._run(undecided, reclaims=reclaims)

    async def admit(self, client: bytes, work: Callable[[Transaction], Awaitable[T]]) -> T:
        """`kv.run` for something that must not happen after the client's end."""

        async def admitted(txn: Transaction) -> T:
            self._check(txn, client, await txn.get(client_key(client)))
            return await work(txn)

        return await self._run(admitted, reclaims=False)

    async def _stored(self, txn: Transaction, name: RequestName) -> bytes | None:
        row, stored = await txn.get_many([client_key(name.client), result_key(name.client, name.number)])
        done_below = self._check(txn, name.client, row)
        if stored is None and name.number < done_below:
            raise UpdateUnknown("a late copy of a request that its client has done with")
        return stored

    def _check(self, txn: Transaction, client: bytes, row: bytes | None) -> int:
        """`done_below` of a client. Raises SessionExpired."""
        if row is None:
            if client not in self._live:
                raise _UnheardOf
            txn.max(client_key(client), 1)
            return 1
        mark = decode_int(row)
        if mark >= ENDED:
            raise SessionExpired("the client's session has ended: what it had open is closed")
        return mark

    async def _run(self, work: Callable[[Transaction], Awaitable[T]], *, reclaims: bool) -> T:
        deadline_s: float | None = None
        while True:
            try:
                return await self._kv.run(work, reclaims=reclaims)
            except _UnheardOf:
                now_s = self._runtime.now_s()
                if deadline_s is not None and now_s >= deadline_s:
                    raise Unavailable("the metadata server has not heard of the client's session") from None
            if self._news is None:
                self._news = self._runtime.future()
            if deadline_s is None:
                # Once: whoever claims to be somebody that nobody knows does not set the pace.
                deadline_s = now_s + HEAR_S
                self._ask_news()
            await pause(self._runtime, HEAR_POLL_S, self._news)


def _decode(stored: bytes, kind: Any) -> Any:
    """The result. Raises the error that was decided."""
    if stored[:1] == _FAILURE:
        raise decode_failure(memoryview(stored)[1:])
    return msgspec.msgpack.decode(memoryview(stored)[1:], type=kind)
