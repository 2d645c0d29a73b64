"""The client's side of lanes: reads that go from the caller's thread to servers of this host and back, past the loop.

Each thread that reads at the moment has lanes of its own, one to each server. Of an open file a lane needs to know
where its chunks are, packed once per routing version. What a lane does not serve is left to the caller to read as ever.

Invariants:
  - Memory of a read that did not end well is renewed before it returns: a server may still write to the old pages.
  - A read counts only if the memory that it named is what was known of it all the time.
  - Only what a file's handle shows is read: its length, and nothing of a file that is open for writing.

Does not know: how lanes are opened (`network`), or what is done about a server that is silent.
"""

from __future__ import annotations

import ctypes
import itertools
import logging
import struct
import threading
from array import array
from collections.abc import Sequence
from contextlib import suppress
from socket import SCM_RIGHTS, SOCK_STREAM, SOL_SOCKET, socket
from typing import TYPE_CHECKING, Any

from ..errors import EmberError, Unreachable
from ..portal import Portal
from ..routing import ChainTarget
from ..runtime import Runtime
from ..striping import chains_of
from ..transport import TcpNetwork
from ..transport.region import REGIONS_MAX, Region, allocated, allocated_version
from ..types import Chunks, Inode
from .native import native

if TYPE_CHECKING:
    from ..client.handle import File
    from ..client.routes import Routes

log = logging.getLogger("emberline.client")

SERVERS_MAX = 64
"""Of one client, that lanes lead to."""
IDLE_MAX = 16
"""Threads that read at the same time and keep their lanes afterwards."""
STAGE_BYTES = 16 << 20
"""For what lies in memory of the program's own; a longer read goes another way."""
SPIN_NS_MIN = 100_000
SPIN_BYTES_PER_NS = 4
"""An answer is looked for so long before the thread sleeps: a little longer than the bytes should take."""
TIMEOUT_NS_MIN = 1_000_000_000
TIMEOUT_BYTES_PER_NS = 0.01
"""Then the lane is given up. A server answers at once, or declines at once: it waits for no disk."""
TELL_TIMEOUT_S = 1.0
RETRY_S = 5.0
"""Until a server that gave no lane, or did not answer on one, is asked again."""

# These three are `struct spec`, `struct spec_slot` and `struct known` of lane/module.c, and `lane_head` of lane/lane.h.
_SPEC = struct.Struct("=QQQQ")
_SLOT = struct.Struct("=QIi")
_KNOWN = struct.Struct("=QQQ")
_HEAD = struct.Struct("=IHHQ")
_MAGIC, _REGION, _FORGET = 0x314C4D45, 3, 4

_calls = itertools.count(1)


class _Lanes:
    """One thread's, while it reads."""

    def __init__(self) -> None:
        self.sockets: dict[int, socket] = {}
        """By the server's index."""
        self.descriptors = array("i", [-1] * SERVERS_MAX)
        self.streams = bytearray(SERVERS_MAX)
        self.stage = Region(STAGE_BYTES)
        self.stage_view = self.stage.memory()
        self.version = -1
        """Of the memory that the servers were told of."""
        self.known = b""
        self.told: dict[int, Region] = {}

    def add(self, index: int, lane: socket) -> None:
        """Raises OSError."""
        lane.settimeout(TELL_TIMEOUT_S)
        self.sockets[index] = lane
        self.streams[index] = lane.type == SOCK_STREAM
        if not self.streams[index]:
            _tell(lane, self.stage)
            for region in self.told.values():
                _tell(lane, region)
        self.descriptors[index] = lane.fileno()

    def tell(self) -> None:
        """Tell the servers of memory that is new, and of what is gone. Raises OSError."""
        version = allocated_version()
        regions = {region.number: region for region in allocated()[: REGIONS_MAX // 2]}
        for lane in (each for each in self.sockets.values() if each.type != SOCK_STREAM):
            for number in self.told.keys() - regions.keys():
                lane.send(_HEAD.pack(_MAGIC, _FORGET, 0, number))
            for number in regions.keys() - self.told.keys():
                _tell(lane, regions[number])
        self.told, self.version = regions, version
        self.known = b"".join(_KNOWN.pack(each.address, each.size, number) for number, each in regions.items())

    def close(self) -> None:
        for lane in self.sockets.values():
            lane.close()


def _tell(lane: socket, region: Region) -> None:
    descriptors = array("i", [region.fd])
    lane.sendmsg([_HEAD.pack(_MAGIC, _REGION, 0, region.number)], [(SOL_SOCKET, SCM_RIGHTS, descriptors)])


class LaneReader:
    """The lanes of one client process to one cluster."""

    def __init__(self, runtime: Runtime, portal: Portal, network: TcpNetwork, routes: Routes) -> None:
        """Only where there is a `native` part."""
        self._runtime = runtime
        self._portal = portal
        self._network = network
        self._routes = routes
        self._idle: list[_Lanes] = []
        self._lock = threading.Lock()
        """Of what follows."""
        self._indices: dict[str, int] = {}
        """Server -> its index in packed files."""
        self._not_before_s: dict[str, float] = {}
        """Servers that gave no lane."""
        self._is_closed = False

    def read(self, files: Sequence[File], items: list[Any], into: Any) -> list[int] | None:
        """Read (file, offset, length) items into `into`: a list of buffers, or one that is filled item after item.

        `files`: those of the items, each once. Returns the bytes of each item, -1 where no lane could serve it; None:
        it was for no lane. What such items' memory holds is nothing to rely on.
        """
        prepared = [self._prepare(file) for file in files]
        if isinstance(into, tuple):
            into = list(into)
        if self._is_closed or not any(prepared) or (isinstance(into, list) and len(into) != len(items)):
            return None
        lanes = self._take()
        counts: list[int] | None = None
        is_whole = False
        try:
            self._open_missing(lanes, files)
            if lanes.sockets:
                counts = self._exchange(lanes, items, into)
            is_whole = True
        except (native.LaneLost, OSError) as error:
            log.debug("lanes are given up: %s", error)
        finally:
            if is_whole:
                self._give(lanes)
            else:
                self._give_up(lanes, into)
        # Whoever renewed memory meanwhile did not wait for us: what came may be in pages that are gone.
        return counts if lanes.version == allocated_version() else None

    def _exchange(self, lanes: _Lanes, items: list[Any], into: Any) -> list[int]:
        if lanes.version != allocated_version():
            lanes.tell()
        size = sum([length for _, _, length in items])
        counts: list[int] = native.read_ranges(
            items,
            into,
            "lane_spec",
            lanes.descriptors,
            lanes.streams,
            lanes.known,
            lanes.stage.number,
            lanes.stage.address,
            STAGE_BYTES,
            next(_calls),
            SPIN_NS_MIN + size // SPIN_BYTES_PER_NS,
            TIMEOUT_NS_MIN + int(size / TIMEOUT_BYTES_PER_NS),
        )
        return counts

    def close(self) -> None:
        """Close all lanes; one that is in use is closed at its end."""
        self._is_closed = True
        while self._idle:
            with suppress(IndexError):
                self._idle.pop().close()

    # --- files -----------------------------------------------------------------------------------------------------

    def _prepare(self, file: File) -> bool:
        """Pack what lanes need to know of `file`, if that is not done yet. False: it is for no lane."""
        version = self._routes.routing.version
        if file.lane_version != version:
            file.lane_spec, file.lane_servers = self._spec(file)
            file.lane_version = version
        return file.lane_spec is not None

    def _spec(self, file: File) -> tuple[bytes | None, list[str]]:
        inode = file.inode_to_read
        if inode is None or not isinstance(inode.layout, Chunks):
            return None, []
        slots, servers = [], []
        for chain_id in chains_of(inode.layout):
            try:
                chain = self._routes.chain(chain_id)
            except EmberError:
                slots.append(_SLOT.pack(0, chain_id, -1))
                continue
            address = self._nearest(self._routes.preferred(chain, chain.serving))
            servers.append(address)
            slots.append(_SLOT.pack(chain.version, chain_id, self._index(address)))
        return _packed(inode, slots), list(dict.fromkeys(each for each in servers if each))

    def _nearest(self, serving: Sequence[ChainTarget]) -> str:
        """The server that reads go to otherwise, too, unless it gives no lane."""
        addresses = [self._routes.address(each.target) for each in serving]
        with self._lock:
            lanes = [each for each in addresses if each not in self._not_before_s]
        return (lanes or addresses or [""])[0]

    def _index(self, address: str) -> int:
        if not address:
            return -1
        with self._lock:
            if address not in self._indices and len(self._indices) < SERVERS_MAX:
                self._indices[address] = len(self._indices)
            return self._indices.get(address, -1)

    # --- lanes -----------------------------------------------------------------------------------------------------

    def _open_missing(self, lanes: _Lanes, files: Sequence[File]) -> None:
        for file in files:
            for address in file.lane_servers:
                index = self._indices.get(address, -1)
                if index >= 0 and lanes.descriptors[index] < 0:
                    self._open(lanes, address, index)

    def _open(self, lanes: _Lanes, address: str, index: int) -> None:
        now_s = self._runtime.now_s()
        if self._not_before_s.get(address, now_s) > now_s:
            return
        try:
            lane = self._portal.run(self._network.open_lane(address))
        except Unreachable:
            return  # The read that goes the other way will see to that.
        with self._lock:
            if lane is None:
                self._not_before_s[address] = now_s + RETRY_S
            else:
                self._not_before_s.pop(address, None)
        if lane is not None:
            lanes.add(index, lane)

    def _take(self) -> _Lanes:
        try:
            return self._idle.pop()
        except IndexError:
            return _Lanes()

    def _give(self, lanes: _Lanes) -> None:
        if self._is_closed or len(self._idle) >= IDLE_MAX:
            lanes.close()
        else:
            self._idle.append(lanes)

    def _give_up(self, lanes: _Lanes, into: Any) -> None:
        """A server may still write to memory of this read: new pages take its place. The stage is not used again."""
        lanes.close()
        with self._lock:
            for address in (each for each, index in self._indices.items() if index in lanes.sockets):
                self._not_before_s[address] = self._runtime.now_s() + RETRY_S
        addresses = [_address_of(buffer) for buffer in (into if isinstance(into, list) else [into])]
        regions = [
            region
            for region in lanes.told.values()
            if any(region.address <= address < region.address + region.size for address in addresses)
        ]

        async def renew() -> None:
            for region in regions:
                region.renew()

        if regions:
            self._portal.run(renew())


def _address_of(buffer: Any) -> int:
    """0 for what cannot be written to: no lane has it."""
    try:
        return ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    except (TypeError, ValueError):
        return 0


def _packed(inode: Inode, slots: Sequence[bytes]) -> bytes:
    assert isinstance(inode.layout, Chunks)
    head = _SPEC.pack(inode.id, inode.length, inode.layout.chunk_size_bytes, len(slots))
    return head + b"".join(slots)
