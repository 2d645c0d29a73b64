"""What a KV server remembers of its clients' commits, so that one that is sent twice is applied once.

One small row per channel of a client, written in the very batch of the commit: the number of the last one applied.

Invariants:
  - A number that is in its row, or below one that was seen on its channel, is never applied again.
  - Rows are bounded by channels in use, not by commits: a channel's row is overwritten. A client's rows go when it
    ends, or once it was silent for SILENT_S, which is far longer than a client goes on sending one commit.
  - The rows are inside [OWN_BEGIN, OWN_END), which no client sees, reads or clears.

Does not know: messages, conflicts.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from ..errors import ProtocolError
from ..runtime import Runtime
from .batch import Batch
from .history import Interval
from .transaction import OptimisticKV
from .types import RANGE_ROWS_MAX, decode_int, encode_int

OWN_BEGIN = b"\xff\xfeemberfs.kv\x00"
OWN_END = b"\xff\xfeemberfs.kv\x01"
EPOCH_KEY = OWN_BEGIN + b"epoch"
CHANNEL_PREFIX = OWN_BEGIN + b"channel"
CHANNEL_END = OWN_BEGIN + b"channem"
CLIENT_ID_BYTES = 16
CHANNELS_MAX = 256
"""Commits of one client in the air; further ones wait at the client."""
SILENT_S = 600.0
"""A client that sent nothing for this long has ended."""


@dataclass(slots=True)
class Channel:
    """One commit at a time comes here."""

    key: bytes
    applied: int = 0
    """The number of the last commit that was applied."""
    seen: int = 0
    flight: asyncio.Task[None] | None = None
    """The commit `seen`, while it is being applied."""


@dataclass(slots=True)
class KvClient:
    """What is known of one client."""

    heard_s: float
    channels: dict[int, Channel] = field(default_factory=dict)


class Commits:
    """The clients of one KV server. `load` before anything else."""

    def __init__(self, kv: OptimisticKV, runtime: Runtime) -> None:
        self._kv = kv
        self._runtime = runtime
        self._clients: dict[bytes, KvClient] = {}

    async def load(self) -> None:
        """Read the rows: from now on they are written only."""
        begin = CHANNEL_PREFIX
        while rows := await self._kv.begin().range(begin, CHANNEL_END):
            for key, value in rows:
                name = key[len(CHANNEL_PREFIX) :]
                number = decode_int(value)
                self._of(name[:-2]).channels[int.from_bytes(name[-2:])] = Channel(key, number, number)
            if len(rows) < RANGE_ROWS_MAX:
                break
            begin = rows[-1][0] + b"\x00"

    def channel(self, client: bytes, number: int) -> Channel:
        """Where a commit of `client` belongs. Raises ProtocolError."""
        check_client(client)
        if not 0 <= number < CHANNELS_MAX:
            raise ProtocolError(f"a client has {CHANNELS_MAX} channels, none is {number}")
        channels = self._of(client).channels
        if number not in channels:
            channels[number] = Channel(CHANNEL_PREFIX + client + number.to_bytes(2))
        return channels[number]

    def _of(self, client: bytes) -> KvClient:
        now_s = self._runtime.now_s()
        known = self._clients.setdefault(client, KvClient(now_s))
        known.heard_s = now_s
        return known

    def forget(self, client: bytes, batch: Batch) -> None:
        """Let go of a client, of its rows with `batch`. Raises ProtocolError."""
        check_client(client)
        self._clients.pop(client, None)
        batch.delete_range(CHANNEL_PREFIX + client, CHANNEL_PREFIX + client + b"\xff\xff\xff")

    def sweep(self, batch: Batch) -> None:
        """`forget` everybody who is silent."""
        silent_s = self._runtime.now_s() - SILENT_S
        for client in [client for client, known in self._clients.items() if known.heard_s < silent_s]:
            self.forget(client, batch)

    def note(self, channel: Channel, number: int, batch: Batch) -> None:
        """Have the row of `channel` say `number` once `batch` is applied."""
        batch.put(channel.key, encode_int(number))


def check_client(client: bytes) -> None:
    if len(client) != CLIENT_ID_BYTES:
        raise ProtocolError(f"a client id has {CLIENT_ID_BYTES} bytes, this one {len(client)}")


def outside(begin: bytes, end: bytes) -> list[Interval]:
    """[begin, end) without the server's own rows, in order."""
    parts = [(begin, min(end, OWN_BEGIN)), (max(begin, OWN_END), end)]
    return [part for part in parts if part[0] < part[1]]
