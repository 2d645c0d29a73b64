"""The server's side of lanes in a simulation: what lane/table.c and lane/server.c do, told in Python.

A real client asks a lane first and the service for what it declined. Here the machine does both for it, at one message:
that the two may come at different moments, the delays of disk and messages see to.

Does not know: memory that is shared, or packets; tests/fs/test_lane_server.py and tests/e2e/test_lanes.py do.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ...checksum import crc32c, sum_before
from ...disk import Disk
from ...engine.extents import Known, Mirror
from ...errors import EmberError
from ...messages import ChunksRead, Message, ReadChunks
from ...runtime import Runtime
from ...transport.types import Service

SHARE = 0.5
"""Of the reads, that go by lanes."""


class _Place(NamedTuple):
    file: int
    block: int
    known: Known
    generation: int


class SimLanes:
    """See `lane.server.Lanes`."""

    def __init__(self, runtime: Runtime, disk_of: Callable[[int], Disk | None]) -> None:
        """`disk_of`: of the target of a chain; None: it is not open."""
        self.served = self.declined = 0
        self._runtime = runtime
        self._disk_of = disk_of
        self._places: dict[tuple[int, bytes], _Place] = {}
        self._allowed: dict[int, int] = {}
        self._until_s = float("-inf")
        self._generation = 0

    def mirror(self, chain: int) -> Mirror:
        return _SimMirror(self, chain)

    def allow(self, chain: int, version: int) -> None:
        self._allowed[chain] = version

    def lease(self, until_s: float) -> None:
        self._until_s = until_s

    async def read(self, chain: int, version: int, chunk: bytes, offset: int, view: memoryview) -> int | None:
        """Fill `view` from `offset` of a chunk; None: declined."""
        count = await self._read(chain, version, chunk, offset, view)
        if count is None:
            self.declined += 1
        else:
            self.served += 1
        return count

    async def _read(self, chain: int, version: int, chunk: bytes, offset: int, view: memoryview) -> int | None:
        place, disk = self._places.get((chain, chunk)), self._disk_of(chain)
        if place is None or disk is None or not self._may_serve(chain, version):
            return None
        length, granule = place.known.extent.length, 1 << place.known.granule_log2
        if not view or offset >= length:
            return None
        view = view[: length - offset]  # The workload reads past the end; a client with a file knows where that is.
        first, last = offset // granule, -(-(offset + len(view)) // granule)
        block = memoryview(bytearray(min(last * granule, length) - first * granule))
        try:
            (count,) = await disk.read([(place.file, [block], place.block + first * granule)])
        except (OSError, EmberError):
            return None
        sums = place.known.sums
        if count < len(block) or crc32c(block, sum_before(sums, first)) != sum_before(sums, last):
            return None
        if self._places.get((chain, chunk)) is not place or not self._may_serve(chain, version):
            return None
        view[:] = block[offset - first * granule :][: len(view)]
        return len(view)

    def _may_serve(self, chain: int, version: int) -> bool:
        return version != 0 and self._allowed.get(chain) == version and self._runtime.now_s() < self._until_s


class _SimMirror:
    """See `engine.extents.Mirror`."""

    def __init__(self, lanes: SimLanes, chain: int) -> None:
        self._lanes = lanes
        self._chain = chain

    def put(self, chunk: bytes, file: int, block: int, known: Known) -> None:
        self._lanes._generation += 1
        self._lanes._places[self._chain, chunk] = _Place(file, block, known, self._lanes._generation)

    def drop(self, chunk: bytes) -> None:
        self._lanes._places.pop((self._chain, chunk), None)

    def clear(self) -> None:
        for key in [key for key in self._lanes._places if key[0] == self._chain]:
            del self._lanes._places[key]


class LanedService:
    """A storage node, and lanes that a part of its reads goes by first."""

    def __init__(self, node: Service, lanes: SimLanes, rng: random.Random) -> None:
        self._node = node
        self._lanes = lanes
        self._random = rng

    async def handle(self, request: Message, buffers: Sequence[memoryview] = (), /) -> Message:
        if not isinstance(request, ReadChunks) or request.local is not None or self._random.random() >= SHARE:
            return await self._node.handle(request, buffers)
        counts = [
            await self._lanes.read(*item)
            for item in zip(
                request.chains, request.chain_versions, request.chunks, request.offsets, buffers, strict=True
            )
        ]
        left = [place for place, count in enumerate(counts) if count is None]
        errors: dict[int, tuple[str, str, int]] = {}
        if left:
            rest = ReadChunks(
                [request.chains[place] for place in left],
                [request.chunks[place] for place in left],
                [request.offsets[place] for place in left],
                [request.chain_versions[place] for place in left],
                request.relaxed,
                request.uncommitted,
            )
            reply = await self._node.handle(rest, [buffers[place] for place in left])
            assert isinstance(reply, ChunksRead)
            for place, count in zip(left, reply.counts, strict=True):
                counts[place] = count
            errors = {left[place]: problem for place, problem in reply.errors.items()}
        return ChunksRead([count or 0 for count in counts], errors)
