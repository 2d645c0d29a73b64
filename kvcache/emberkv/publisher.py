"""KV events over ZeroMQ, as vLLM publishes its own: who follows those follows these.

    PUB      [topic, number u64 big-endian, msgpack batch]; the topic is the name of a namespace
    ROUTER   asked [number]: [empty, topic, number, batch] of all batches from that one on that are kept, then an end

A subscriber that is slow or not there loses batches, sees it by the numbers, and asks the second socket. Numbers begin
at 0 with the process.

Does not know: what the events are about. Needs pyzmq (`pip install 'emberline[events]'`).
"""

from __future__ import annotations

import asyncio
from collections import deque
from itertools import islice
from typing import Any

import msgspec
from emberfs.runtime import Runtime

from .events import EventFeed

TICK_S = 0.05
"""An event waits for others so long."""
KEPT_BATCHES = 10_000
"""For subscribers that come late, as in vLLM."""
KEPT_BYTES = 256 << 20
"""Of those batches, at most: with tokens they are large."""
WAITING_MAX = 100_000
"""Batches for one subscriber; further ones it loses."""
ASKING_MAX = 64
"""Subscribers that are being told again; a further one ends the answer to the first."""
_END = (-1).to_bytes(8, "big", signed=True)


class Publisher:
    """See the module. `endpoint` and `replay_endpoint` are ZeroMQ's: tcp://*:5557, ipc:///path."""

    def __init__(self, feed: EventFeed, runtime: Runtime, *, endpoint: str, replay_endpoint: str = "") -> None:
        try:
            import zmq
        except ModuleNotFoundError as error:
            raise ImportError("KV events need pyzmq: pip install 'emberline[events]'") from error
        self._feed, self._runtime = feed, runtime
        self._number = 0
        self._kept: deque[tuple[int, bytes, bytes]] = deque()
        self._kept_bytes = 0
        self._encoder = msgspec.msgpack.Encoder()
        self._zmq = zmq
        self._asking: dict[bytes, int] = {}
        """Who asked -> the number of the batch that it is told next."""
        self._context = zmq.Context()
        self._pub: Any = self._context.socket(zmq.PUB)
        self._pub.set_hwm(WAITING_MAX)
        self._router: Any = None
        self._work: asyncio.Task[None] | None = None
        try:
            self._pub.bind(endpoint)
            if replay_endpoint:
                self._router = self._context.socket(zmq.ROUTER)
                self._router.router_mandatory = (
                    1  # Else what a subscriber does not take at once is dropped, its end too.
                )
                self._router.bind(replay_endpoint)
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise OSError(error.errno, f"{error.strerror}: {endpoint} {replay_endpoint}".rstrip()) from error

    def start(self) -> None:
        """Begin to tell."""
        self._work = self._runtime.spawn(self._keep_telling(), "kv-events")

    async def close(self) -> None:
        """Tell what is left."""
        if self._work is not None:
            self._work.cancel()
            await asyncio.wait([self._work])
            self.tell()
        self._context.destroy(linger=200)

    def tell(self) -> None:
        """What happened since, and what somebody asks for again."""
        for name, batch in self._feed.take(self._runtime.wall_ns() / 1e9):
            topic, body = name.encode(), self._encoder.encode(batch)
            self._pub.send_multipart((topic, self._number.to_bytes(8, "big"), body))
            self._kept.append((self._number, topic, body))
            self._kept_bytes += len(body)
            while len(self._kept) > KEPT_BATCHES or self._kept_bytes > KEPT_BYTES:
                self._kept_bytes -= len(self._kept.popleft()[2])
            self._number += 1
        if self._router is not None:
            self._tell_again()

    def _tell_again(self) -> None:
        """As much as those who asked take now; the rest the next time."""
        while self._router.poll(0):
            client, *asked = self._router.recv_multipart()
            if len(asked) == 2 and len(asked[1]) == 8:  # Else it is no question that we know.
                self._asking.pop(client, None)
                self._asking[client] = int.from_bytes(asked[1], "big")
        while len(self._asking) > ASKING_MAX:
            del self._asking[next(iter(self._asking))]
        for client in list(self._asking):
            try:
                self._go_on(client)
            except self._zmq.Again:
                continue
            except self._zmq.ZMQError:
                pass  # It is gone.
            del self._asking[client]

    def _go_on(self, client: bytes) -> None:
        skipped = self._asking[client] - (self._number - len(self._kept))
        for number, topic, body in islice(self._kept, min(max(skipped, 0), len(self._kept)), None):
            self._send(client, topic, number.to_bytes(8, "big"), body)
            self._asking[client] = number + 1
        self._send(client, b"", _END, b"")

    def _send(self, client: bytes, *frames: bytes) -> None:
        self._router.send_multipart((client, b"", *frames), self._zmq.NOBLOCK)

    async def _keep_telling(self) -> None:
        while True:
            await self._runtime.sleep(TICK_S)
            self.tell()
