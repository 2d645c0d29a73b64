"""The ordered KV of another process, reached through a `KvServer`.

Round trips: one for a `get`, a `get_many` or a `range` (more if the reply is very large), one for a commit.

A commit that was lost in the air is sent again under its number, and the server knows whether it has it (see
`server`). So `commit` raises UpdateUnknown only if nobody answered for `retry_s`; `run` passes that on, because nobody
but the caller can find out what it means.

Does not know: the network, or the engine behind the server.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import EmberError
from ..messages import KvCommit, KvForget, KvGet, KvRows, KvScan, KvValues, Message
from ..runtime import Runtime
from ..transport import Connection
from .batch import Batch, Row
from .buffered import BufferedKV, Reads
from .commits import CHANNELS_MAX, CLIENT_ID_BYTES


@dataclass(frozen=True, kw_only=True, slots=True)
class RemoteKVConfig:
    """How patient a client of the KV server is."""

    retry_s: float = 10.0
    """For how long a request is tried while nobody answers it. A restart of the server takes less."""

    def __post_init__(self) -> None:
        if self.retry_s < 0:
            raise ValueError(f"retry_s is at least 0, not {self.retry_s}")


class RemoteKV(BufferedKV):
    """A client of one KV server. `close` lets the server forget it; the connection stays the caller's."""

    def __init__(self, connection: Connection, runtime: Runtime, *, config: RemoteKVConfig | None = None) -> None:
        super().__init__(runtime, retry_s=(config or RemoteKVConfig()).retry_s)
        self._connection = connection
        self._client = runtime.random_bytes(CLIENT_ID_BYTES)
        self._numbers: list[int] = []
        """Of the last commit on each channel."""
        self._idle: list[int] = []
        """Channels with nothing in the air; the one used last is taken first, so few are ever used."""
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def _fetch(self, keys: Sequence[bytes], version: int | None) -> tuple[int, list[bytes | None]]:
        values: list[bytes | None] = []
        while True:
            reply = await self._ask(KvGet(list(keys[len(values) :]), version))
            assert isinstance(reply, KvValues)
            values += reply.values
            version = reply.version
            if len(values) == len(keys):
                return version, values

    async def _scan(
        self, begin: bytes, end: bytes, limit: int, reverse: bool, version: int | None
    ) -> tuple[int, list[Row]]:
        rows: list[Row] = []
        while True:
            reply = await self._ask(KvScan(bytes(begin), bytes(end), limit - len(rows), reverse, version))
            assert isinstance(reply, KvRows)
            rows += reply.rows
            version = reply.version
            if not reply.more:
                return version, rows
            if reverse:
                end = rows[-1][0]
            else:
                begin = rows[-1][0] + b"\x00"

    async def _commit(self, reads: Reads, batch: Batch) -> None:
        channel = await self._take_channel()
        try:
            self._numbers[channel] += 1
            request = KvCommit(
                client=self._client,
                channel=channel,
                number=self._numbers[channel],
                version=reads.version,
                keys=reads.keys,
                intervals=reads.intervals,
                clears=batch.clears,
                rows=[(key, write) for key, write in batch.writes.items() if not isinstance(write, tuple)],
                steps=[(key, list(write)) for key, write in batch.writes.items() if isinstance(write, tuple)],
                reclaims=batch.reclaims,
            )
            await self._ask(request, changes=True)
        finally:
            self._idle.append(channel)
            while self._waiting:
                waiter = self._waiting.popleft()
                if not waiter.done():
                    waiter.set_result(None)
                    break

    async def _take_channel(self) -> int:
        while not self._idle:
            if len(self._numbers) < CHANNELS_MAX:
                self._numbers.append(0)
                return len(self._numbers) - 1
            waiter = self._runtime.future()
            self._waiting.append(waiter)
            await waiter
        return self._idle.pop()

    async def _release(self) -> None:
        if not self._numbers:
            return
        try:
            await self._connection.call(KvForget(self._client))
        except EmberError:
            pass  # The server forgets a silent client by itself.

    async def _ask(self, request: Message, *, changes: bool = False) -> Message:
        return await self._persist(lambda: self._connection.call(request), changes=changes)
