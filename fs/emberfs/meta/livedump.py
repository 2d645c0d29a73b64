"""The metadata backup of a namespace that is in use: `dump` wants it at rest, and a cluster never rests.

Nobody is stopped and no snapshot is held: rows are read a page at a time, while they change. What comes out is not of
one moment. But it is whole in itself (loaded, fsck finds nothing), and every file and directory that was there all the
time is in it, under a name that it had meanwhile; what came, went or was renamed is there as before or as after.

How: each page of entries is read with the inodes that it names. Then all inodes: those that live and were not named yet
are new, or were renamed from where we had not been to where we had; directories know their names, and for files the
entries are read again. What has no name even then is damage: it is put into the trash of the dump, so that it is not
lost. A tree that was rearranged so that what was read is no tree is read again from the start.

Memory: two integers for each inode, a name for each directory. The rows wait in files that the caller gives.
Does not know: chunks, and who changes the namespace.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from typing import BinaryIO

import msgspec
from msgspec.structs import replace

from ..errors import Conflict
from ..kv.types import KV, decode_int
from ..types import FIRST_INODE, ROOT_INODE, TRASH_INODE, Chunks, Inode, Kind
from .dump import DUMP_FORMAT, Header, Line, describe, fields
from .keys import (
    KIND_AT,
    ORPHANS_INODE,
    TrashRow,
    decode_inode,
    encode_inode,
    entry_key,
    entry_name,
    entry_value,
    get_ids,
    inode_key,
    length_key,
    pack_id,
    unpack_id,
)
from .scan import pages

ATTEMPTS_MAX = 5
"""So often a tree that is rearranged meanwhile is read from the start."""
LOOKS_MAX = 5
"""So often an entry is looked at that names nothing. What names nothing even then is damage, and not in the dump."""
ROUNDS_MAX = 5
"""So often all entries are read for the sake of inodes without a name."""
SEARCHES_MAX = 2
"""So many of these rounds look for the name of one inode."""
ROOTS = (ROOT_INODE, TRASH_INODE, ORPHANS_INODE)

OpenSpool = Callable[[], BinaryIO]
"""A new empty file, to be written and then read back; it is closed in the end."""


async def dump_live(
    kv: KV,
    write_line: Callable[[str], object],
    *,
    open_spool: OpenSpool,
    now_ns: int,
    cluster: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET,
) -> list[str]:
    """As `dump.dump`, at the wall clock time `now_ns`. Returns the trash ids of what nothing names.

    Raises Conflict if the tree is rearranged again and again, and what reading raises.
    """
    for _ in range(ATTEMPTS_MAX):
        with ExitStack() as files:
            gathering = _Gathering(kv, lambda: files.enter_context(open_spool()), now_ns)
            try:
                await gathering.read()
            except _Torn:
                continue
            # Last: ids that were given out meanwhile are below it.
            next_inode = (await get_ids(kv.begin())).next
            _write(gathering, write_line, next_inode, cluster)
            return gathering.nameless
    raise Conflict("directories are moved about all the time, or damaged: fsck tells; else dump again")


def _write(
    gathering: _Gathering,
    write_line: Callable[[str], object],
    next_inode: int,
    cluster: msgspec.Raw | msgspec.UnsetType,
) -> None:
    counts = dict.fromkeys(("inode", "entry", "time", "xattr", "intent", "garbage", "trash"), 0)
    for row, _ in gathering.lines():
        counts[row] += 1
    write_line(msgspec.json.encode(Header(DUMP_FORMAT, next_inode, counts, cluster)).decode())
    for row, line in gathering.lines():
        write_line(msgspec.json.encode({"row": row, **line}).decode())


class _Torn(Exception):
    """What was read of the tree is no tree."""


class _Spool:
    """Values one after the other in a file."""

    def __init__(self, file: BinaryIO) -> None:
        self.count = 0
        self._file = file

    def add(self, value: object) -> int:
        """Returns its number."""
        encoded = msgspec.msgpack.encode(value)
        self._file.write(len(encoded).to_bytes(4, "big") + encoded)
        self.count += 1
        return self.count - 1

    def __iter__(self) -> Iterator[list[bytes]]:
        self._file.seek(0)
        for _ in range(self.count):
            yield msgspec.msgpack.decode(self._file.read(int.from_bytes(self._file.read(4), "big")), type=list[bytes])


class _Gathering:
    """One attempt."""

    def __init__(self, kv: KV, open_spool: OpenSpool, now_ns: int) -> None:
        self.nameless: list[str] = []
        """The names, in the trash of the dump, of what has none."""
        self._kv = kv
        self._now_ns = now_ns
        self._entries = _Spool(open_spool())
        """(key, value)"""
        self._inodes = _Spool(open_spool())
        """(row,), once for each inode, with the length that reports say."""
        self._rest = _Spool(open_spool())
        """(kind of row, line as JSON)"""
        self._entry_of: dict[int, int] = {}
        """Inode -> number of the last entry that names it."""
        self._links: collections.Counter[int] = collections.Counter()
        """Inode of a file with several names -> how many of them were read."""
        self._dead: set[int] = set()
        """Numbers of entries that are not true any more."""
        self._renewed: dict[bytes, int] = {}
        """Key -> number of its entry, where it was read again."""
        self._homes: dict[int, tuple[int, str]] = {}
        """Directory -> (parent, name)."""
        self._is_anchored: dict[int, bool] = {}
        """Directory -> whether it hangs on one of the roots."""
        self._names: collections.Counter[int] = collections.Counter()
        """Inode -> how many entries of the dump name it."""
        self._garbage: set[int] = set()
        self._trash: set[str] = set()
        """Names of the entries in the trash."""

    async def read(self) -> None:
        """Read it all. Raises _Torn."""
        async for page in pages(self._kv, b"D"):
            await self._take(page, is_again=False)
        lost = await self._unnamed()
        searches: collections.Counter[int] = collections.Counter()
        for _ in range(ROUNDS_MAX):
            if not lost:
                break
            await self._adopt([inode for inode in lost if searches[inode] == SEARCHES_MAX])
            await self._search({inode for inode in lost if searches[inode] < SEARCHES_MAX})
            searches.update(lost)
            unnamed = lost - self._entry_of.keys()
            unnamed |= self._displaced() | self._strangers()
            lost = await self._living(unnamed)
        else:
            raise _Torn
        await self._settle()
        await self._read_garbage()
        await self._read_rest()

    # --- entries and the inodes that they name ---------------------------------------------------------------------

    async def _take(self, page: Sequence[tuple[bytes, bytes]], *, is_again: bool) -> None:
        """Entries, each with an inode that was there when the entry was."""
        for _ in range(LOOKS_MAX):
            txn = self._kv.begin()
            rows = await txn.get_many([inode_key(unpack_id(entry)) for _, entry in page], snapshot=True)
            ends = await txn.get_many([length_key(unpack_id(entry)) for _, entry in page], snapshot=True)
            gone = []
            for (key, entry), row, end in zip(page, rows, ends, strict=True):
                inode = None if row is None else decode_inode(row)
                if inode is None or not (inode.is_dir or inode.nlink):
                    gone.append(key)
                else:
                    self._note(key, entry, _measured(inode, decode_int(end)), is_again=is_again)
            if not gone:
                return
            values = await self._kv.begin().get_many(gone, snapshot=True)
            page = [(key, value) for key, value in zip(gone, values, strict=True) if value is not None]

    def _note(self, key: bytes, entry: bytes, inode: Inode, *, is_again: bool) -> None:
        number = self._entries.add((key, entry))
        before = self._entry_of.get(inode.id)
        if before is None:
            self._inodes.add((encode_inode(inode),))
        elif inode.is_dir or inode.nlink == 1:
            self._dead.add(before)  # It was renamed while we read.
        self._entry_of[inode.id] = number
        if inode.nlink > 1 and not inode.is_dir:
            self._links[inode.id] += 1
        if is_again:
            self._renewed[key] = number

    async def _unnamed(self) -> set[int]:
        """Inodes that live, and that no entry has named, or fewer than they have links."""
        lost = set()
        async for page in pages(self._kv, b"I"):
            for key, row in page:
                number, inode = unpack_id(key, 1), decode_inode(row)
                is_linked = not inode.is_dir and inode.nlink > max(self._links[number], 1)
                if number >= FIRST_INODE and _lives(inode) and (number not in self._entry_of or is_linked):
                    lost.add(number)
        return lost

    async def _search(self, lost: set[int]) -> None:
        """Take the entries that name these inodes, if there are any."""
        files = lost - await self._take_directories(lost)
        if files:
            async for page in pages(self._kv, b"D"):
                await self._take([(key, entry) for key, entry in page if unpack_id(entry) in files], is_again=True)

    async def _adopt(self, inodes: Collection[int]) -> None:
        """Name these in the trash, each by its own id: no entry there has it, as ids of both are given out once."""
        rows = await self._kv.begin().get_many([inode_key(inode) for inode in inodes], snapshot=True)
        for inode in map(decode_inode, filter(None, rows)):
            trash_id = f"{inode.id:016x}"
            key = entry_key(pack_id(TRASH_INODE), trash_id.encode())
            await self._take([(key, entry_value(inode.id, inode.kind))], is_again=True)
            self.nameless.append(trash_id)

    async def _take_directories(self, inodes: Collection[int]) -> set[int]:
        """Directories know their names: no search is needed for them. Returns those of `inodes`."""
        rows = await self._kv.begin().get_many([inode_key(inode) for inode in inodes], snapshot=True)
        found = [inode for inode in map(decode_inode, filter(None, rows)) if inode.is_dir]
        keys = [entry_key(pack_id(each.parent), each.name.encode()) for each in found]
        values = await self._kv.begin().get_many(keys, snapshot=True)
        page = [
            (key, value)
            for key, value, inode in zip(keys, values, found, strict=True)
            if value is not None and unpack_id(value) == inode.id
        ]
        await self._take(page, is_again=True)
        return {each.id for each in found}

    def _displaced(self) -> set[int]:
        """Inodes whose last known name is another one's by now."""
        return {
            unpack_id(entry)
            for number, (key, entry) in enumerate(self._entries)
            if self._renewed.get(key, number) != number and self._entry_of[unpack_id(entry)] == number
        }

    def _strangers(self) -> set[int]:
        """Directories that something is in, and that have no name."""
        return {unpack_id(key, 1) for key, _ in self._valid()} - self._entry_of.keys() - {*ROOTS}

    async def _living(self, inodes: Collection[int]) -> set[int]:
        rows = await self._kv.begin().get_many([inode_key(inode) for inode in inodes], snapshot=True)
        return {inode for inode, row in zip(inodes, rows, strict=True) if row is not None and _lives(decode_inode(row))}

    # --- the tree --------------------------------------------------------------------------------------------------

    async def _settle(self) -> None:
        """From here on it is known which entries are in the dump."""
        for key, entry in self._valid():
            if entry[KIND_AT] == Kind.DIRECTORY:
                self._homes[unpack_id(entry)] = (unpack_id(key, 1), entry_name(key).decode())
        self._is_anchored = dict.fromkeys(ROOTS, True)
        for directory in self._homes:
            self._anchor(directory)
        missing = set()
        for key, entry in self._valid():
            parent = unpack_id(key, 1)
            if not self._anchor(parent):
                missing.add(parent)
                continue
            self._names[unpack_id(entry)] += 1
            if parent == TRASH_INODE:
                self._trash.add(entry_name(key).decode())
        if await self._living(missing):
            raise _Torn

    def _valid(self) -> Iterator[tuple[bytes, bytes]]:
        for number, (key, entry) in enumerate(self._entries):
            if number not in self._dead and self._renewed.get(key, number) == number:
                yield key, entry

    def _anchor(self, directory: int) -> bool:
        """Whether a directory hangs on a root. Raises _Torn for one that is inside of itself."""
        below: dict[int, None] = {}
        while (is_anchored := self._is_anchored.get(directory)) is None:
            if directory in below:
                raise _Torn
            below[directory] = None
            if directory not in self._homes:
                is_anchored = False
                break
            directory = self._homes[directory][0]
        self._is_anchored.update(dict.fromkeys(below, is_anchored))
        return is_anchored

    # --- what belongs to inodes ------------------------------------------------------------------------------------

    async def _read_garbage(self) -> None:
        """Roots, and inodes without a name that wait to be collected."""
        for row in await self._kv.begin().get_many([inode_key(inode) for inode in ROOTS], snapshot=True):
            if row is not None:
                self._inodes.add((row,))
        async for page in pages(self._kv, b"G"):
            rows = await self._kv.begin().get_many([inode_key(unpack_id(key, 9)) for key, _ in page], snapshot=True)
            for (key, value), row in zip(page, rows, strict=True):
                inode = unpack_id(key, 9)
                if row is None or self._names[inode] or inode in self._garbage:
                    continue
                self._garbage.add(inode)
                if inode not in self._entry_of:
                    self._inodes.add((row,))
                self._note_rest("garbage", key, value)

    async def _read_rest(self) -> None:
        for row, prefix in (("time", b"M"), ("xattr", b"X"), ("intent", b"T")):
            async for page in pages(self._kv, prefix):
                for key, value in page:
                    inode = unpack_id(key, 1)
                    if self._names[inode] or inode in self._garbage or inode in ROOTS:
                        self._note_rest(row, key, value)
        async for page in pages(self._kv, b"R"):
            for key, value in page:
                if (trash_id := key[1:].decode()) in self._trash:
                    self._trash.discard(trash_id)
                    self._note_rest("trash", key, value)
        # Restored, or removed for good, while we read, or without a name at all. Where from is not known; and loaded it
        # has to stay for a while: somebody may want it.
        for trash_id in sorted(self._trash):
            line = {"id": trash_id, **fields(TrashRow(path=f"/{trash_id}", deleted_ns=self._now_ns))}
            self._rest.add((b"trash", msgspec.json.encode(line)))

    def _note_rest(self, row: str, key: bytes, value: bytes) -> None:
        self._rest.add((row.encode(), msgspec.json.encode(describe(row, key, value))))

    # --- the lines -------------------------------------------------------------------------------------------------

    def lines(self) -> Iterator[tuple[str, Line]]:
        """(kind of row, line) of the whole dump."""
        for (row,) in self._inodes:
            inode = decode_inode(row)
            if inode.id in self._garbage:
                inode = replace(inode, nlink=0)
            elif inode.id not in ROOTS:
                if not self._names[inode.id]:
                    continue
                if inode.is_dir:
                    parent, name = self._homes[inode.id]
                    inode = replace(inode, parent=parent, name=name)
                else:
                    inode = replace(inode, nlink=self._names[inode.id])
            yield "inode", fields(inode)
        for key, entry in self._valid():
            if self._is_anchored[unpack_id(key, 1)]:
                yield "entry", describe("entry", key, entry)
        for kind, line in self._rest:
            yield kind.decode(), msgspec.json.decode(line, type=Line)


def _lives(inode: Inode) -> bool:
    """Whether it should have a name."""
    return inode.is_dir or inode.nlink > 0


def _measured(inode: Inode, end: int) -> Inode:
    """The inode with the length that reports say: whoever has it open will not be there after a load."""
    return replace(inode, length=max(end, inode.length)) if isinstance(inode.layout, Chunks) else inode
