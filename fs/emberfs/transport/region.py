"""Memory that a client shares with the servers of its host: a region is a memfd, mapped here and there.

The server reads from its disk straight into a region, and copies what is to be written out of it once. Invariants:
  - A region never becomes smaller (F_SEAL_SHRINK): a server that looked at a page of it which is gone would die.
  - What a lost server may still write to is not ours any more. A block of ours is never used again, and memory that
    belongs to a program gets new pages at its old place (`Region.renew`): a late write lands where nobody looks.

Does not know: frames, or what the bytes mean.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import itertools
import mmap
import os
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ..errors import LimitExceeded, ProtocolError

BLOCK_BYTES_MIN = 64 << 10
SLAB_BYTES = 16 << 20
"""Smaller blocks share a region of this size."""
KEPT_BYTES_MAX = 128 << 20
"""Blocks that nobody uses are kept up to so much."""
REGIONS_MAX = 1024
"""Of one connection, as a server allows them."""
REGION_BYTES_MAX = 1 << 40
HUGE_BLOCK_BYTES = 1 << 20
"""A memfd whose blocks are longer is on hugetlbfs."""

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_PROTECTION = mmap.PROT_READ | mmap.PROT_WRITE
_MAP_FIXED = 0x10

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

_numbers = itertools.count(1)


class Place(NamedTuple):
    """Where a buffer lies."""

    region: Region
    offset: int


class Region:
    """Pages of this process that have a file descriptor. They live as long as somebody has a view of them."""

    def __init__(self, size: int) -> None:
        """Raises OSError if there is no memory, LimitExceeded."""
        if not 0 < size <= REGION_BYTES_MAX:
            raise LimitExceeded(f"shared memory of {size} bytes: from 1 byte to 1 TiB")
        self.size = size
        self.number = next(_numbers)
        """Names the pages to a server: `renew` makes it another one."""
        self._memfd = _Memfd(size)
        self._address = _map(None, size, self._memfd.fd, mmap.MAP_SHARED)

    @property
    def fd(self) -> int:
        return self._memfd.fd

    @property
    def address(self) -> int:
        """Of the first byte."""
        return self._address

    def memory(self) -> memoryview:
        """The pages. To be called once: they go with the last view of this one."""
        array = self._array()
        weakref.finalize(array, _libc.munmap, self._address, self.size).atexit = False
        return memoryview(array).cast("B")

    def offset_of(self, view: memoryview) -> int:
        """Where a view of these pages begins."""
        return ctypes.addressof(ctypes.c_char.from_buffer(view)) - self._address if view.nbytes else 0

    def renew(self) -> None:
        """Other pages with the same content, at the same place. Who has the old ones changes nothing here."""
        with _renewing():
            fresh, content = _Memfd(self.size), memoryview(self._array()).cast("B")
            written = 0
            while written < self.size:
                written += os.pwrite(fresh.fd, content[written:], written)
            _map(self._address, self.size, fresh.fd, mmap.MAP_SHARED | _MAP_FIXED)
            self._memfd, self.number = fresh, next(_numbers)
            _changed()

    def _array(self) -> ctypes.Array[ctypes.c_char]:
        return (ctypes.c_char * self.size).from_address(self._address)


class _Memfd:
    """Sealed memory behind a file descriptor, which is closed with its last user."""

    def __init__(self, size: int) -> None:
        self.fd = os.memfd_create("emberline", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        weakref.finalize(self, os.close, self.fd).atexit = False
        os.ftruncate(self.fd, size)
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)


def _map(address: int | None, size: int, fd: int, flags: int) -> int:
    mapped = _libc.mmap(address, size, _PROTECTION, flags, fd, 0)
    if mapped is None or mapped == ctypes.c_void_p(-1).value:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return int(mapped)


class Block:
    """Memory for the buffers of one call, in a region of ours."""

    __slots__ = ("place", "view")

    def __init__(self, place: Place, view: memoryview) -> None:
        self.place = place
        self.view = view


_allocated: dict[int, Region] = {}
"""By the id of the object whose memory they are; it takes its entry along when it goes."""

_changes = itertools.count(1)
_version = 0
"""Grows with each change of `_allocated`, or of the pages of a region."""


def allocate(size: int) -> memoryview:
    """Memory that servers of this host fill, and read from, in place. It goes with the last view of it.

    A forked child shares it with its parent. Raises LimitExceeded, OSError.
    """
    region = Region(size)
    view = region.memory()
    _allocated[id(view.obj)] = region
    _changed()
    weakref.finalize(view.obj, _gone, id(view.obj)).atexit = False
    return view


def _gone(key: int) -> None:
    _allocated.pop(key, None)
    _changed()


def _changed() -> None:
    global _version
    _version = next(_changes)


_renewals = 0
_renewals_now = 0
_renewals_lock = threading.Lock()


@contextlib.contextmanager
def _renewing() -> Iterator[None]:
    global _renewals, _renewals_now
    with _renewals_lock:
        _renewals += 1
        _renewals_now += 1
    try:
        yield
    finally:
        with _renewals_lock:
            _renewals_now -= 1


def renewals() -> int | None:
    """How often memory got new pages; None: some gets them now.

    What lands in memory, in another thread than that of the renewal, is lost if it lands between the copy and the new
    pages. It is there for good if this was the same number before and after.
    """
    with _renewals_lock:
        return None if _renewals_now else _renewals


def _after_fork() -> None:
    """Threads that were at it are the parent's."""
    global _renewals_lock, _renewals_now
    _renewals_lock, _renewals_now = threading.Lock(), 0


os.register_at_fork(after_in_child=_after_fork)


def allocated_version() -> int:
    """Another number means that `allocated` gives something else."""
    return _version


def allocated() -> list[Region]:
    """All memory of `allocate` that is in use."""
    return list(_allocated.values())


def find(view: memoryview) -> Place | None:
    """Where `view` lies, if in memory of `allocate`. The address of a read-only view cannot be had."""
    region = _allocated.get(id(view.obj))
    return None if region is None or view.readonly else Place(region, region.offset_of(view))


class Blocks:
    """Memory for what lies elsewhere, used again and again. For one thread."""

    def __init__(self) -> None:
        self._free: dict[int, list[Block]] = {}
        self._kept_bytes = 0

    def take(self, size: int) -> Block:
        """A block of at least `size` bytes, with what its last user left there."""
        capacity = max(BLOCK_BYTES_MIN, 1 << (size - 1).bit_length())
        free = self._free.setdefault(capacity, [])
        if not free:
            region = Region(max(capacity, SLAB_BYTES))
            view = region.memory()
            free += [Block(Place(region, at), view[at : at + capacity]) for at in range(0, region.size, capacity)]
            self._kept_bytes += region.size
        self._kept_bytes -= capacity
        return free.pop()

    def give(self, block: Block) -> None:
        """Nobody uses `block` any more, no server either. One that a lost server may write to is never given."""
        capacity = len(block.view)
        if self._kept_bytes + capacity <= KEPT_BYTES_MAX:
            self._kept_bytes += capacity
            self._free[capacity].append(block)


class ForeignRegions:
    """The regions of one client, as its server sees them. Raises ProtocolError where the client breaks the rules."""

    def __init__(self) -> None:
        self._views: dict[int, memoryview] = {}

    def add(self, number: int, fd: int) -> None:
        """Map a region. Takes `fd` as its own."""
        try:
            if number in self._views or len(self._views) >= REGIONS_MAX:
                raise ProtocolError(f"region {number} is there already, or there are more than {REGIONS_MAX}")
            try:
                seals, size = fcntl.fcntl(fd, fcntl.F_GET_SEALS), os.fstat(fd).st_size
            except OSError as error:
                raise ProtocolError(f"region {number} is no memfd: {error}") from error
            if os.fstat(fd).st_blksize > HUGE_BLOCK_BYTES:
                raise ProtocolError(f"region {number} is of huge pages, which can be taken away under a server")
            if not seals & fcntl.F_SEAL_SHRINK:
                raise ProtocolError(f"region {number} may become smaller: seal it with F_SEAL_SHRINK")
            try:
                if sum(map(len, self._views.values())) + size > REGION_BYTES_MAX:
                    raise ProtocolError(f"region {number}: a client brings at most {REGION_BYTES_MAX >> 40} TiB")
                self._views[number] = memoryview(mmap.mmap(fd, size, mmap.MAP_SHARED, _PROTECTION))
            except (OSError, ValueError) as error:
                raise ProtocolError(f"region {number} cannot be mapped: {error}") from error
        finally:
            os.close(fd)

    def forget(self, number: int) -> None:
        """The client will not name it any more. It is unmapped when nobody uses it."""
        self._views.pop(number, None)

    def views(self, places: Sequence[tuple[int, int]], lengths: Sequence[int]) -> list[memoryview]:
        """The memory at (number, offset), of that length."""
        views = []
        for (number, offset), length in zip(places, lengths, strict=True):
            region = self._views.get(number)
            if region is None or offset + length > len(region):
                raise ProtocolError(f"no {length} bytes at {offset} of region {number}")
            views.append(region[offset : offset + length])
        return views
