"""The server's side of lanes, as a storage node uses it: what may be served, and until when.

Does not know: chains, beside their number and version; or how a client gets a lane.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Protocol

from ..engine.extents import Known, Mirror
from . import native

TABLE_BYTES_MAX = 1 << 30
"""More than the extents of all targets together, which are what bounds it (`EngineConfig.extents_bytes_max`)."""
SPIN_US = 200
"""A thread that had something to do looks for more for so long: who reads a batch checks it, and comes again."""
CORES_PER_THREAD = 4
"""A thread moves more bytes than a disk gives; the cores are the clients' too."""
THREADS_MAX = 8


class Lanes(Protocol):
    """What a storage node tells the lanes of its server."""

    def mirror(self, chain: int) -> Mirror:
        """Where the target of `chain` puts its extents."""

    def allow(self, chain: int, version: int) -> None:
        """Clients that go by this version of the chain are served. 0: nobody is."""

    def lease(self, until_s: float) -> None:
        """Nothing is served after that moment of the runtime's clock."""


class ChainLanes:
    """What the lanes of a server are told of one target: in which version of its chain they serve it."""

    def __init__(self, lanes: Lanes | None) -> None:
        self._lanes = lanes
        self._chain = 0

    def serve(self, chain: int, version: int) -> None:
        """Serve clients that go by `version`, and no others."""
        if self._lanes is not None:
            self._chain = chain
            self._lanes.allow(chain, version)

    def stop(self) -> None:
        """Serve nobody."""
        if self._lanes is not None and self._chain:
            self._lanes.allow(self._chain, 0)


class LaneServer:
    """Threads that serve lanes. See `Lanes`; `stop` at the end."""

    def __init__(self) -> None:
        """Raises OSError. Only where there is a `native` part."""
        threads = max(1, min(THREADS_MAX, len(os.sched_getaffinity(0)) // CORES_PER_THREAD))
        self._server: Any = native.Server(TABLE_BYTES_MAX, threads, SPIN_US)

    def adopt(self, descriptor: int, is_stream: bool, tenant: str | None = None) -> None:
        """Serve the lane that ends in `descriptor`, which is ours from now on. Raises OSError.

        `tenant`: it is a reader's, who reads under grants of that tenant only ("": of any).
        """
        self._server.adopt(descriptor, is_stream, tenant)

    def set_keys(self, keys: Sequence[bytes]) -> None:
        """Those that grants are checked with from now on."""
        self._server.set_keys(b"".join(keys))

    def mirror(self, chain: int) -> Mirror:
        return TableMirror(self._server, chain)

    def allow(self, chain: int, version: int) -> None:
        self._server.allow(chain, version)

    def lease(self, until_s: float) -> None:
        self._server.lease(int(until_s * 1e9))

    def gauges(self) -> dict[str, float]:
        """Figures for metrics."""
        return {f"lane_{name}": float(value) for name, value in self._server.stats().items()}

    def stop(self) -> None:
        """End the threads and every lane."""
        self._server.stop()


class TableMirror:
    """The extents of one chain's target."""

    def __init__(self, server: Any, chain: int) -> None:
        self._server = server
        self._chain = chain

    def put(self, chunk: bytes, file: int, block: int, known: Known) -> None:
        extent, sums = known.extent, known.sums
        self._server.put(self._chain, chunk, file, block, extent.length, known.granule_log2, sums)

    def drop(self, chunk: bytes) -> None:
        self._server.drop(self._chain, chunk)

    def clear(self) -> None:
        self._server.clear(self._chain)
