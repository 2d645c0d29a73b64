"""Lanes of a store that a server owns (see `lane`): what the server's need to know, and what its clients' do.

Each chain is one target and stays so, behind one socket; while the server lives nobody else owns the store. Its lanes
end with it, and clients find the next one as they do for calls.

Does not know: how a client is attached.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from ..engine import ChunkEngine
from ..lane import native
from ..lane.client import LaneReader
from ..lane.server import LaneServer
from ..portal import Portal
from ..routing import Chain, Routing
from ..runtime import Runtime
from ..transport import TcpNetwork

log = logging.getLogger("emberline.sharing")

VERSION = 1
"""Of all chains, and of the routing."""
FOREVER_S = 1e9


class StoreRoutes:
    """The routing of a store, for a `LaneReader`."""

    def __init__(self) -> None:
        self.routing = Routing(version=VERSION)

    def chain(self, chain_id: int) -> Chain:
        """Whichever."""
        return Chain(chain_id, VERSION, ())


def lane_server() -> LaneServer | None:
    """None: there is no `native` part, or its threads cannot be started."""
    try:
        return None if native is None else LaneServer()
    except OSError as error:
        log.warning("no lanes: %s", error)
        return None


def serve_lanes(server: LaneServer, engines: Mapping[int, ChunkEngine]) -> None:
    """From now on `server` serves what these engines have."""
    server.lease(FOREVER_S)
    for chain, engine in engines.items():
        engine.extents.mirror = server.mirror(chain)
        server.allow(chain, VERSION)


def end_lanes(server: LaneServer, engines: Mapping[int, ChunkEngine]) -> None:
    """When this returns nothing is served, and engines tell nobody what changes."""
    server.stop()
    for engine in engines.values():
        if engine.extents.mirror is not None:
            engine.extents.mirror.clear()
            engine.extents.mirror = None


def lane_reader(runtime: Runtime, portal: Portal, network: TcpNetwork, address: str) -> LaneReader | None:
    """The lanes of a client whose server is at `address`; None: there is no `native` part."""
    if native is None:
        return None
    return LaneReader(runtime, portal, network, StoreRoutes(), usual=lambda _: [address])
