"""What clients do to a simulated cluster: reads and updates of a few hot chunks, all of it into a history.

Every payload is unique, so that a read says which update it saw.
Does not know: faults, or what is right (see `checker`).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from ...errors import DataLost, EmberError, Unavailable, UpdateUnknown
from ...messages import ChunksRead, Message, ReadChunks, RemoveChunks, TruncateChunk, WriteChunks
from ...types import CHUNK_SIZE_BYTES_MIN, chunk_id
from .checker import Call, History, Operation, Outcome, Read, Remove, Replace, Truncate, Write
from .cluster import SimClient

INODE = 1 << 40
"""Of all its chunks: no file has it."""
LENGTH_MAX = 6000
"""Of a chunk, in bytes. Over a sector, so that appends go in place, and over a block."""
TAG_BYTES = 8


@dataclass(kw_only=True, slots=True)
class Workload:
    """Some chunks and what happened to them."""

    chains: Sequence[int]
    chunks: int = 6
    pause_s: float = 1.2
    """The mean pause of a worker between two operations."""
    history: History = field(default_factory=History)
    stalls_s: list[tuple[float, float]] = field(default_factory=list)
    """(begin, how long it took) of every operation."""
    is_over: bool = False
    _written: int = 0

    def chunk(self, number: int) -> bytes:
        return chunk_id(INODE, number)

    def chain(self, number: int) -> int:
        return self.chains[number % len(self.chains)]

    async def run(self, client: SimClient, rng: random.Random) -> None:
        """One worker of a client, until `is_over`."""
        while not self.is_over:
            await client.process.sleep(rng.expovariate(1 / self.pause_s))
            numbers = [min(rng.randrange(self.chunks), rng.randrange(self.chunks))]
            if rng.random() < 0.15:
                numbers = rng.sample(range(self.chunks), 3)
            kind = rng.choices(["read", "write", "replace", "truncate", "remove"], [48, 22, 18, 6, 6])[0]
            if kind == "truncate":
                numbers = numbers[:1]
            await self.perform(client, numbers, [self._operation(kind, rng) for _ in numbers])

    def _operation(self, kind: str, rng: random.Random) -> Operation:
        match kind:
            case "read":
                return Read(0, 2 * LENGTH_MAX) if rng.random() < 0.7 else Read(rng.randrange(LENGTH_MAX), 512)
            case "write":
                offset = rng.choice([0, 4096, rng.randrange(LENGTH_MAX // 2), rng.randrange(LENGTH_MAX // 2)])
                return Write(offset, self._payload(rng))
            case "replace":
                return Replace(self._payload(rng))
            case "truncate":
                return Truncate(rng.choice([0, 4096, rng.randrange(LENGTH_MAX)]))
        return Remove()

    def _payload(self, rng: random.Random) -> bytes:
        self._written += 1
        tag = b"<%06d>" % self._written
        assert len(tag) == TAG_BYTES
        return tag * (rng.choice([1, 4, rng.randrange(1, LENGTH_MAX // 2), 4096]) // TAG_BYTES or 1)

    async def perform(
        self, client: SimClient, numbers: Sequence[int], operations: Sequence[Operation], *, relaxed: bool = False
    ) -> None:
        """One request for `operations` (all of one kind) on chunks `numbers`, and what became of it."""
        world = client.process.world
        begun_s = world.now_s()
        calls = [
            self.history.begin(self.chunk(number), operation, client=client.name, now_s=begun_s)
            for number, operation in zip(numbers, operations, strict=True)
        ]
        request, buffers = self._request(numbers, operations)
        outcome, got = Outcome.DONE, [b""] * len(calls)
        try:
            reply = await client.router.call(request, buffers)
        except Unavailable:
            outcome = Outcome.NOTHING
        except (UpdateUnknown, DataLost):
            outcome = Outcome.UNKNOWN
        except EmberError as error:
            raise AssertionError(f"{client.name} got {error!r} for {operations[0]}") from error
        else:
            if isinstance(reply, ChunksRead):
                got = [bytes(buffer[:count]) for buffer, count in zip(buffers, reply.counts, strict=True)]
                assert not reply.errors, f"every replica of a chunk is damaged: {reply.errors}"
        now_s = world.now_s()
        for call, content in zip(calls, got, strict=True):
            # Of a batch that failed, another part may have happened.
            unsure = outcome is Outcome.NOTHING and len(calls) > 1 and not isinstance(call.operation, Read)
            self.history.end(call, Outcome.UNKNOWN if unsure else outcome, content, now_s=now_s)
        self.stalls_s.append((begun_s, now_s - begun_s))
        world.note(f"{client.name} {outcome.value}")

    def _request(self, numbers: Sequence[int], operations: Sequence[Operation]) -> tuple[Message, list[memoryview]]:
        chains, chunks = [self.chain(number) for number in numbers], [self.chunk(number) for number in numbers]
        match operations[0]:
            case Read():
                reads = [operation for operation in operations if isinstance(operation, Read)]
                buffers = [memoryview(bytearray(read.length)) for read in reads]
                return ReadChunks(chains, chunks, [read.offset for read in reads]), buffers
            case Write() | Replace():
                updates = [operation for operation in operations if isinstance(operation, Write | Replace)]
                offsets = [update.offset if isinstance(update, Write) else 0 for update in updates]
                replace = isinstance(updates[0], Replace)
                request = WriteChunks(b"", 0, 0, chains, chunks, offsets, CHUNK_SIZE_BYTES_MIN, replace)
                return request, [memoryview(update.payload) for update in updates]
            case Truncate(length):
                return TruncateChunk(chains[0], chunks[0], length), []
        return RemoveChunks(chains, chunks), []


def operations_of(history: History) -> int:
    """How many calls came to an end."""
    return len(history.calls) - len(unended(history))


def unended(history: History) -> list[Call]:
    """Calls that never came back."""
    return [call for call in history.calls if call.ended is None]
