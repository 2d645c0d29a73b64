"""The client's side of lanes: reads that go from the caller's thread to servers and back, past the loop.

Each thread that reads at the moment has lanes of its own, one to each server. Of an open file a lane needs to know
where its chunks are, packed once per routing version. What a lane does not serve is left to the caller to read as ever.

Invariants:
  - A read that was not answered ends only when no server writes to its memory any more: the server has closed the lane,
    or else the memory has new pages.
  - A read counts only if no memory got new pages while it was under way: what landed in another thread might be lost.
  - Only what a file's handle shows is read: its length, and nothing of a file that is open for writing.

Does not know: how lanes are opened (`network`), or what is done about a server that is silent.
"""

from __future__ import annotations

import ctypes
import itertools
import logging
import os
import struct
import threading
import weakref
from array import array
from collections.abc import Callable, Sequence
from socket import SCM_RIGHTS, SHUT_WR, SOCK_STREAM, SOL_SOCKET, socket
from types import CodeType
from typing import Any, Protocol

from ..errors import EmberError, Unreachable
from ..portal import Portal, hold_interrupts, release_interrupts
from ..routing import Chain, Routing
from ..runtime import Runtime
from ..striping import chains_of
from ..transport import TcpNetwork
from ..transport.region import REGIONS_MAX, Region, allocated, allocated_version, renewals
from ..types import Chunks, Inode
from .native import native

log = logging.getLogger("emberline.client")

SERVERS_MAX = 64
"""Of one client, that lanes lead to."""
IDLE_MAX = 16
"""Threads that read at the same time and keep their lanes afterwards."""
STAGE_SLOTS = 4
"""What lies in memory of the program's own is copied out of one of them while servers fill the others."""
SPIN_NS_MIN = 100_000
SPIN_BYTES_PER_NS = 4
"""An answer is looked for so long before the thread sleeps: a little longer than the bytes should take."""
CORES_PER_READER = 2
"""Its own, where it may look, and one for the server. With fewer, who looks keeps others of us from their work."""
LATELY_S = 0.005
"""Who read so long ago is counted as a reader still: it does something with what it got, and comes again."""
TIMEOUT_NS_MIN = 1_000_000_000
TIMEOUT_BYTES_PER_NS = 0.01
"""Then the lane is given up. A server answers at once, or declines at once: it waits for no disk."""
TELL_TIMEOUT_S = 1.0
END_TIMEOUT_S = 0.5
"""A server ends a lane that is given up as soon as it has done what it was at. One that is stopped does not."""
RETRY_S = 5.0
"""Until a server that gave no lane, or did not answer on one, is asked again."""

# These three are `struct spec`, `struct spec_slot` and `struct known` of lane/module.c, and `lane_head` of lane/lane.h.
_SPEC = struct.Struct("=QQQQ")
_SLOT = struct.Struct("=QIi")
_KNOWN = struct.Struct("=QQQ")
_HEAD = struct.Struct("=IHHQ")
_MAGIC, _REGION, _FORGET = 0x324C4D45, 3, 4
GRANTS_MAX = 64
"""Of a reader, that a lane remembers: LANE_GRANTS_MAX of lane.h."""

NO_SUMS = bytearray()

_calls = itertools.count(1)


class LaneFile(Protocol):
    """What lanes want of a file. All but the first is theirs."""

    @property
    def inode_to_read(self) -> Inode | None:
        """The row that reads go by; None: no lane may read it."""

    lane_spec: bytes | None
    lane_servers: list[str]
    lane_version: tuple[int, int]


class Routes(Protocol):
    """What lanes want of a client's routing."""

    @property
    def routing(self) -> Routing:
        """The one that it goes by."""

    def chain(self, chain_id: int) -> Chain:
        """Raises EmberError: there is none."""


class _Lanes:
    """One thread's, while it reads."""

    def __init__(self) -> None:
        self.sockets: dict[int, socket] = {}
        """By the server's index."""
        self.descriptors = array("i", [-1] * SERVERS_MAX)
        self.streams = bytearray(SERVERS_MAX)
        self.pending = bytearray(SERVERS_MAX)
        """Of the last read: those that were asked and did not answer."""
        self.stage = Region(STAGE_SLOTS * native.STAGE_SLOT_BYTES)
        self.stage_view = self.stage.memory()
        self.version = -1
        """Of the memory that the servers were told of."""
        self.known = b""
        self.told: set[int] = set()
        self.places: dict[bytes, int] = {}
        """Where servers have the grants that were shown to some of them, the one used last at the end."""
        self.shown: list[dict[int, bytes]] = [{} for _ in range(SERVERS_MAX)]
        """Of each server, what is where."""
        self.shows = bytearray(SERVERS_MAX)
        """Those that do not know what is read under now."""
        self.given_s = 0.0
        """When the last read ended."""
        self.proven: set[int] = set()
        """Servers that have answered on their lanes."""
        self.may_look = False
        """There are cores enough for this read to look for its answer."""
        self.waited_s = 0.0
        """How long the last read was in the native part: nearly all of it for servers."""

    def add(self, index: int, lane: socket, regions: Sequence[Region]) -> None:
        """`regions`: those that were told of to others. Raises OSError."""
        lane.settimeout(TELL_TIMEOUT_S)
        self.sockets[index] = lane
        self.shown[index] = {}
        self.proven.discard(index)
        self.streams[index] = lane.type == SOCK_STREAM
        if not self.streams[index]:
            for region in (self.stage, *regions):
                _tell(lane, region)
        self.descriptors[index] = lane.fileno()

    def tell(self) -> bool:
        """Tell the servers of memory that is new, and of what is gone: True if some is. Raises OSError."""
        version = allocated_version()
        regions = {region.number: region for region in allocated()[: REGIONS_MAX // 2]}
        gone = self.told - regions.keys()
        for lane in (each for each in self.sockets.values() if each.type != SOCK_STREAM):
            for number in gone:
                lane.send(_HEAD.pack(_MAGIC, _FORGET, 0, number))
            for number in regions.keys() - self.told:
                _tell(lane, regions[number])
        self.told, self.version = set(regions), version
        self.known = b"".join(_KNOWN.pack(each.address, each.size, number) for number, each in regions.items())
        return bool(gone)

    def place_of(self, grant: bytes) -> int:
        """Where servers have it that know it."""
        place = self.places.pop(grant, 0)
        if not place:
            is_full = len(self.places) == GRANTS_MAX
            place = self.places.pop(next(iter(self.places))) if is_full else len(self.places) + 1
        self.places[grant] = place
        return place

    def drop(self, index: int) -> bool:
        """Give a lane up. False: its server may still write to the memory of the last read."""
        lane = self.sockets.pop(index)
        self.descriptors[index] = -1
        with lane:
            if self.streams[index] or not self.pending[index]:
                return True
            try:
                lane.shutdown(SHUT_WR)
                lane.settimeout(END_TIMEOUT_S)
                while lane.recv(1 << 16):  # A late answer, and then the end, which comes after the last byte.
                    pass
            except TimeoutError:
                return False
            except OSError:
                pass
            return True

    def close(self) -> None:
        for lane in self.sockets.values():
            lane.close()


def _tell(lane: socket, region: Region) -> None:
    descriptors = array("i", [region.fd])
    lane.sendmsg([_HEAD.pack(_MAGIC, _REGION, 0, region.number)], [(SOL_SOCKET, SCM_RIGHTS, descriptors)])


class LaneReader:
    """The lanes of one client process to one cluster."""

    def __init__(
        self,
        runtime: Runtime,
        portal: Portal,
        network: TcpNetwork,
        routes: Routes,
        *,
        usual: Callable[[Chain], list[str]],
    ) -> None:
        """`usual`: the servers that a read of a chain goes to otherwise, the first one before others.

        Only where there is a `native` part.
        """
        self._runtime = runtime
        self._portal = portal
        self._network = network
        self._routes = routes
        self._usual = usual
        self._lock = threading.Lock()
        """Of what follows."""
        self._idle: list[_Lanes] = []
        """The ones used last at the end."""
        self._taken = weakref.WeakSet[_Lanes]()
        """Of the threads that read now. Those that an interrupt left behind are not counted for ever."""
        self._made = weakref.WeakSet[_Lanes]()
        """All, wherever they are: for a child."""
        self._cores = len(os.sched_getaffinity(0))
        self._indices: dict[str, int] = {}
        """Server -> its index in packed files."""
        self._barred: dict[str, float] = {}
        """Servers that gave no lane, did not answer on one, or ended it at once -> until when."""
        self._generation = 0
        """Grows when who is barred changes: files are packed anew."""
        self._is_closed = False

    def read(
        self,
        files: Sequence[LaneFile],
        items: list[Any],
        into: Any,
        *,
        code: CodeType,
        grant: bytes = b"",
        sums: array[int] | None = None,
    ) -> list[int] | None:
        """Read (file, offset, length) items into `into`: buffers, or one that is filled item after item.

        `files`: those of the items, each once. `code`: of who would read them otherwise, for the ledger. Returns the
        bytes of each item, -1 where no lane could serve it; None: it was for no lane. What such items' memory holds is
        nothing to rely on. `grant`: what a reader reads under. `sums`: gets a CRC32C of 4 bytes for each item that was
        served, of what is in its memory after the last copy.
        """
        if isinstance(into, tuple):
            into = list(into)
        if self._is_closed or (isinstance(into, list) and len(into) != len(items)):
            return None
        servers = self._prepare(files)
        before = renewals()
        if not servers or before is None:
            return None
        began_s = self._runtime.now_s()
        try:
            lanes = self._take()
        except OSError as error:
            log.debug("no memory to stage in: %s", error)
            return None
        counts: list[int] | None = None
        waited_s, is_whole = 0.0, False
        try:
            self._open_missing(lanes, servers)
            if lanes.sockets:
                counts = self._exchange(lanes, items, into, grant, sums)
                waited_s = lanes.waited_s
            is_whole = True
        except native.LaneLost as error:
            log.debug("lanes are given up: %s", error)
        except (BufferError, TypeError, ValueError, OverflowError, OSError) as error:
            if any(lanes.pending):
                raise  # Of the handler of a signal: nobody else raises any of them once something was sent.
            # Whoever reads it otherwise says what is wrong with the arguments.
            is_whole = not isinstance(error, OSError)
        finally:
            if is_whole:
                self._give(lanes)
            else:
                held = hold_interrupts()
                try:
                    self._give_up(lanes, into)
                finally:
                    if held is not None:
                        release_interrupts(held)
        if renewals() != before:
            return None
        if counts is not None and -1 not in counts:
            # Else whoever reads the rest notes all of it.
            self._portal.ledger.note_lane(code, self._runtime.now_s() - began_s, waited_s, sum(counts))
        return counts

    def _exchange(self, lanes: _Lanes, items: list[Any], into: Any, grant: bytes, sums: array[int] | None) -> list[int]:
        if lanes.version != allocated_version() and lanes.tell():
            self._close_idle()  # They hold memory that is gone, and might not be used for long.
        place, unaware = 0, list[int]()
        if grant:
            place = lanes.place_of(grant)
            unaware = [index for index in lanes.sockets if lanes.shown[index].get(place) != grant]
            for index in unaware:
                lanes.shows[index] = 1
        size = sum([length for _, _, length in items])
        sent_s = self._runtime.now_s()
        counts: list[int] = native.read_ranges(
            items,
            into,
            "lane_spec",
            lanes.descriptors,
            lanes.streams,
            lanes.pending,
            lanes.known,
            lanes.stage.number,
            lanes.stage.address,
            lanes.stage.size,
            next(_calls),
            SPIN_NS_MIN + size // SPIN_BYTES_PER_NS if lanes.may_look else 0,
            TIMEOUT_NS_MIN + int(size / TIMEOUT_BYTES_PER_NS),
            place,
            grant,
            lanes.shows,
            NO_SUMS if sums is None else sums,
        )
        for index in unaware:
            if not lanes.shows[index]:
                lanes.shown[index][place] = grant
            lanes.shows[index] = 0
        lanes.waited_s = self._runtime.now_s() - sent_s
        lanes.proven.update(lanes.sockets)
        return counts

    def close(self) -> None:
        """Close all lanes; one that is in use is closed at its end."""
        self._is_closed = True
        self._close_idle()

    def forget_after_fork(self) -> None:
        """In the child: close our copies of all lanes. Threads that are not there may hold the lock."""
        self._is_closed = True
        for lanes in list(self._made):
            lanes.close()

    # --- files -----------------------------------------------------------------------------------------------------

    def _prepare(self, files: Sequence[LaneFile]) -> list[str]:
        """Pack what lanes need to know of the files that changed since; returns the servers of all of them."""
        if self._barred:
            self._look_barred()
        version = (self._routes.routing.version, self._generation)
        servers: dict[str, None] = {}
        for file in files:
            if file.lane_version != version:
                file.lane_spec, file.lane_servers = self._spec(file)
                file.lane_version = version
            servers.update(dict.fromkeys(file.lane_servers))
        return list(servers)

    def _spec(self, file: LaneFile) -> tuple[bytes | None, list[str]]:
        inode = file.inode_to_read
        if inode is None or not isinstance(inode.layout, Chunks):
            return None, []
        slots, servers = [], []
        for chain_id in chains_of(inode.layout):
            try:
                chain = self._routes.chain(chain_id)
            except EmberError:
                slots.append(slot(0, chain_id, -1))
                continue
            addresses = [address for address in self._usual(chain) if address]
            address = next((each for each in addresses if each not in self._barred), "")
            index = self._index(address)
            slots.append(slot(chain.version, chain_id, index))
            if index >= 0:
                servers.append(address)
        return packed(inode, slots), list(dict.fromkeys(servers))

    def _index(self, address: str) -> int:
        """-1: no lane leads there."""
        if not address:
            return -1
        with self._lock:
            if address not in self._indices and len(self._indices) < SERVERS_MAX:
                self._indices[address] = len(self._indices)
            return self._indices.get(address, -1)

    # --- servers ---------------------------------------------------------------------------------------------------

    def _bar(self, address: str) -> None:
        with self._lock:
            self._barred[address] = self._runtime.now_s() + RETRY_S
            self._generation += 1

    def _look_barred(self) -> None:
        now_s = self._runtime.now_s()
        with self._lock:
            if over := [address for address, until_s in self._barred.items() if until_s <= now_s]:
                for address in over:
                    del self._barred[address]
                self._generation += 1

    def _open_missing(self, lanes: _Lanes, servers: Sequence[str]) -> None:
        """Raises OSError."""
        for address in servers:
            index = self._indices[address]
            if lanes.descriptors[index] >= 0 or address in self._barred:
                continue
            try:
                lane = self._portal.run(self._network.open_lane(address))
            except Unreachable:
                continue  # It was not called before. The read that goes the other way will see to that.
            if lane is None:
                self._bar(address)
            else:
                lanes.add(index, lane, [region for region in allocated() if region.number in lanes.told])

    # --- lanes -----------------------------------------------------------------------------------------------------

    def _take(self) -> _Lanes:
        """For a read that begins now: `_taken` has it until it ends."""
        since_s = self._runtime.now_s() - LATELY_S
        with self._lock:
            idle = self._idle.pop() if self._idle else None
        lanes = idle or _Lanes()
        self._made.add(lanes)
        with self._lock:
            self._taken.add(lanes)
            lately = itertools.takewhile(lambda each: each.given_s > since_s, reversed(self._idle))
            lanes.may_look = (len(self._taken) + len(list(lately))) * CORES_PER_READER <= self._cores
        return lanes

    def _give(self, lanes: _Lanes) -> None:
        """After a read that ended well."""
        lanes.given_s = self._runtime.now_s()
        with self._lock:
            self._taken.discard(lanes)
            is_kept = not self._is_closed and len(self._idle) < IDLE_MAX
            if is_kept:
                self._idle.append(lanes)
        if not is_kept:
            lanes.close()

    def _give_up(self, lanes: _Lanes, into: Any) -> None:
        """A lane is lost, or does not answer. The memory is the caller's again when this returns."""
        with self._lock:
            self._taken.discard(lanes)
        # Who ends a lane at our first request may be of another release, which does so each time.
        refused = [index for index in lanes.sockets if index not in lanes.proven]
        silent = [index for index in list(lanes.sockets) if not lanes.drop(index)]
        for address in [address for address, index in self._indices.items() if index in (*silent, *refused)]:
            self._bar(address)
        if not silent:
            return
        addresses = [_address_of(buffer) for buffer in (into if isinstance(into, list) else [into])]
        regions = [
            region
            for region in allocated()
            if any(region.address <= address < region.address + region.size for address in addresses)
        ]

        async def renew() -> None:
            for region in regions:
                try:
                    region.renew()
                except OSError as error:
                    log.error("memory that a silent server may still write to could not be renewed: %s", error)

        if regions:
            self._portal.run(renew())

    def _close_idle(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for lanes in idle:
            lanes.close()


def _address_of(buffer: Any) -> int:
    """0 for what cannot be written to: no lane has it."""
    try:
        return ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    except (TypeError, ValueError):
        return 0


def slot(version: int, chain: int, server: int) -> bytes:
    """A chain of a file's stripe, and the index of the server that its lane leads to; -1: there is none."""
    return _SLOT.pack(version, chain, server)


def packed(inode: Inode, slots: Sequence[bytes]) -> bytes:
    """What lanes need to know of a file: `lane_spec`."""
    assert isinstance(inode.layout, Chunks)
    head = _SPEC.pack(inode.id, inode.length, inode.layout.chunk_size_bytes, len(slots))
    return head + b"".join(slots)
