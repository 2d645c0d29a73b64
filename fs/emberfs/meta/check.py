"""fsck of the namespace: does every row agree with the others, and, on request, make it so.

Run it when nobody writes: it looks at a page of rows at a time. What repair does is safe in that no byte of a file
gets lost: an inode that nobody names gets a name in /lost+found, an entry that names nothing goes.

Does not know: whether the bytes in chunks are right; that is the scrub's.
"""

from __future__ import annotations

import collections
from collections.abc import Collection

import msgspec
from msgspec.structs import replace

from ..errors import Corruption
from ..kv.types import KV, Transaction, decode_int, encode_int
from ..types import FIRST_INODE, PATH_BYTES_MAX, ROOT_INODE, TRASH_INODE, Inode, Kind
from .blocks import block_of
from .chunks import ChunkOps
from .keys import (
    KIND_AT,
    Counter,
    TrashRow,
    block_key,
    check_entry,
    counted_length,
    decode_inode,
    encode_row,
    entry_key,
    entry_name,
    entry_range,
    entry_value,
    get_ids,
    get_inode,
    inode_key,
    pack_id,
    put_inode,
    trash_key,
    unpack_id,
)
from .scan import pages

LOST_AND_FOUND = "lost+found"
LOST_INODE = 4
"""Its id: one of the store's own, so it needs none from the lease and is not counted."""


class Finding(msgspec.Struct, frozen=True):
    """Something that is not as it should be."""

    kind: str
    """"entry", "parent", "links", "unnamed", "row", "trash", "counter" or "chunks"."""
    path: str
    """Where, as far as that is known; "" if it is about no path."""
    detail: str
    repaired: bool


async def check(
    kv: KV, chunks: ChunkOps | None = None, *, reserved: Collection[int] = (), repair: bool = False
) -> list[Finding]:
    """Check all rows, and with `chunks` that every chunk has a file. After a repair, a second run is silent.

    `reserved`: inodes that chunks may be of before they have a row, as a running service knows them (read as we go).
    """
    checker = _Checker(kv, repair=repair)
    if not await checker.check_rows():
        return checker.findings
    await checker.check_entries()
    await checker.check_inodes()
    await checker.check_rows_of_inodes()
    await checker.check_trash()
    await checker.check_counters()
    if chunks is not None:
        await checker.check_chunks(chunks, reserved)
    return checker.findings


class _Checker:
    """One run. The passes go in order: a later one counts on what an earlier one repaired."""

    def __init__(self, kv: KV, *, repair: bool) -> None:
        self.findings: list[Finding] = []
        self._kv = kv
        self._repair = repair
        self._names: collections.Counter[int] = collections.Counter()
        """Inode -> how many entries name it."""
        self._garbage: set[int] = set()
        """Inodes without a name that wait to be collected."""
        self._counts: collections.Counter[Counter] = collections.Counter()
        """What the counters should say, after the repairs."""

    async def check_rows(self) -> bool:
        """Every row against its checksum. False if the other passes would only draw wrong conclusions.

        A damaged entry goes (what it named turns up in /lost+found). A damaged inode stays: its chunks may be all
        that is left of a file, so it is for a person to restore a dump or to give the file up.
        """
        is_whole = True
        async for page in pages(self._kv, b"D"):
            for key, entry in page:
                try:
                    check_entry(entry)
                except Corruption:
                    self._find("row", entry_name(key).decode(), "a damaged directory entry")
                    await self._put(key, None)
                    is_whole &= self._repair
        async for page in pages(self._kv, b"I"):
            for key, row in page:
                try:
                    decode_inode(row)
                except Corruption:
                    detail = "a damaged inode row: restore a metadata dump, or the file from elsewhere"
                    self.findings.append(Finding("row", f"inode {unpack_id(key, 1):x}", detail, False))
                    is_whole = False
        return is_whole

    async def check_entries(self) -> None:
        """Entries against the inodes of both ends."""
        async for page in pages(self._kv, b"D"):
            txn = self._kv.begin()
            parents = await txn.get_many([b"I" + key[1:9] for key, _ in page])
            rows = await txn.get_many([b"I" + entry[:8] for _, entry in page])
            for (key, entry), parent, row in zip(page, parents, rows, strict=True):
                if parent is None or decode_inode(parent).kind != Kind.DIRECTORY:
                    await self._drop_entry(key, "it is in a directory that does not exist")
                elif row is None:
                    await self._drop_entry(key, f"it names inode {unpack_id(entry):x}, which does not exist")
                else:
                    await self._check_entry(key, entry, decode_inode(row))

    async def _check_entry(self, key: bytes, entry: bytes, inode: Inode) -> None:
        parent, name = unpack_id(key, 1), entry_name(key).decode()
        if inode.is_dir and self._names[inode.id]:
            await self._drop_entry(key, "it is a second name of a directory")
            return
        self._names[inode.id] += 1
        if entry[KIND_AT] != inode.kind:
            detail = f"the entry says kind {entry[KIND_AT]}, the inode {int(inode.kind)}"
            self._find("entry", await self._path(key), detail)
            await self._put(key, entry_value(inode.id, inode.kind))
        if inode.is_dir and (inode.parent, inode.name) != (parent, name):
            detail = f"the directory says that it is {inode.name!r} in inode {inode.parent:x}"
            self._find("parent", await self._path(key), detail)
            await self._change(inode, replace(inode, parent=parent, name=name))

    async def _drop_entry(self, key: bytes, detail: str) -> None:
        self._find("entry", await self._path(key), detail)
        await self._put(key, None)

    async def check_inodes(self) -> None:
        """Inodes against the number of their names, and counting them."""
        self._garbage = {unpack_id(key, 9) async for page in pages(self._kv, b"G") for key, _ in page}
        async for page in pages(self._kv, b"I"):
            for _, row in page:
                inode = decode_inode(row)
                if inode.id < FIRST_INODE:
                    continue
                names = self._names[inode.id]
                self._counts[Counter.LENGTH] += counted_length(inode)
                if not names and not inode.nlink and inode.id in self._garbage:
                    continue
                if not names:
                    self._find("unnamed", f"/{LOST_AND_FOUND}/{inode.id:x}", f"inode {inode.id:x} has no name")
                    await self._adopt(inode)
                elif not inode.is_dir and inode.nlink != names:
                    detail = f"inode {inode.id:x} has {names} names and counts {inode.nlink}"
                    self._find("links", "", detail)
                    await self._change(inode, replace(inode, nlink=names))
                self._counts[Counter.DIRECTORIES if inode.is_dir else Counter.FILES] += 1

    async def _adopt(self, inode: Inode) -> None:
        """Name an inode in /lost+found."""
        if not self._repair:
            return

        async def work(txn: Transaction) -> None:
            directory = await self._lost_and_found(txn)
            name = f"{inode.id:x}"
            txn.put(entry_key(pack_id(directory), name.encode()), entry_value(inode.id, inode.kind))
            named = replace(inode, parent=directory, name=name) if inode.is_dir else replace(inode, nlink=1)
            put_inode(txn, inode, named)

        await self._kv.run(work)

    async def _lost_and_found(self, txn: Transaction) -> int:
        """The id of that directory, which is made when it is needed."""
        key = entry_key(pack_id(ROOT_INODE), LOST_AND_FOUND.encode())
        entry = await txn.get(key)
        if entry is not None and entry[KIND_AT] == Kind.DIRECTORY:
            return unpack_id(entry)
        root = await get_inode(txn, ROOT_INODE)
        assert root is not None
        put_inode(txn, None, replace(root, id=LOST_INODE, name=LOST_AND_FOUND, parent=ROOT_INODE))
        txn.put(key, entry_value(LOST_INODE, Kind.DIRECTORY))
        return LOST_INODE

    async def check_rows_of_inodes(self) -> None:
        """Rows that are about an inode: there must be one."""
        # Not sessions: one outlives a file that was removed while it was open.
        for prefix, what in ((b"M", "time"), (b"X", "attribute"), (b"T", "truncate"), (b"E", "length")):
            async for page in pages(self._kv, prefix):
                rows = await self._kv.begin().get_many([b"I" + key[1:9] for key, _ in page])
                for (key, _), row in zip(page, rows, strict=True):
                    if row is None:
                        self._find("row", "", f"a {what} row of inode {unpack_id(key, 1):x}, which does not exist")
                        await self._put(key, None)

    async def check_trash(self) -> None:
        """What the trash remembers against what is in it."""
        trash = pack_id(TRASH_INODE)
        async for page in pages(self._kv, b"R"):
            entries = await self._kv.begin().get_many([entry_key(trash, key[1:]) for key, _ in page])
            for (key, _), entry in zip(page, entries, strict=True):
                if entry is None:
                    self._find("trash", "", f"trash entry {key[1:].decode()} has nothing in it")
                    await self._put(key, None)
                self._counts[Counter.TRASH] += entry is not None
        begin, end = entry_range(trash)
        while rows := await self._kv.begin().range(begin, end):
            for key, _ in rows:
                trash_id = entry_name(key).decode()
                if await self._kv.begin().get(trash_key(trash_id)) is None:
                    self._find("trash", "", f"trash entry {trash_id} does not say where it was")
                    path = f"/{LOST_AND_FOUND}/{trash_id}"
                    await self._put(trash_key(trash_id), encode_row(TrashRow(path=path, deleted_ns=0)))
                    self._counts[Counter.TRASH] += 1
            begin = rows[-1][0] + b"\0"

    async def check_counters(self) -> None:
        """What `usage` says against what is there."""
        self._counts[Counter.GARBAGE] = len(self._garbage)
        for counter in Counter:
            says = decode_int(await self._kv.begin().get(counter.value))
            if says != self._counts[counter]:
                detail = f"{counter.name.lower()}: counted {self._counts[counter]}, the counter says {says}"
                self._find("counter", "", detail)
                await self._put(counter.value, encode_int(self._counts[counter]))

    async def check_chunks(self, chunks: ChunkOps, reserved: Collection[int]) -> None:
        """Chunks against the files that they are of."""
        end = (await get_ids(self._kv.begin())).next
        async for inodes in chunks.owners(0, end):
            # Before the rows: whoever is reserved no more by then was committed before, or its chunks are gone.
            unnamed = frozenset(reserved)
            blocks = await self._kv.begin().get_many([block_key(block_of(inode)) for inode in inodes])
            rows = await self._kv.begin().get_many([inode_key(inode) for inode in inodes])
            for inode, block, row in zip(inodes, blocks, rows, strict=True):
                if row is None and block is None and inode not in unnamed:
                    self._find("chunks", "", f"there are chunks of inode {inode:x}, which does not exist")
                    if self._repair:
                        await chunks.remove(inode, None)

    def _find(self, kind: str, path: str, detail: str) -> None:
        """Note a finding. Every kind has a repair, which the caller goes on to."""
        self.findings.append(Finding(kind=kind, path=path, detail=detail, repaired=self._repair))

    async def _put(self, key: bytes, value: bytes | None) -> None:
        """Repair a row: set it, or remove it."""
        if not self._repair:
            return

        async def work(txn: Transaction) -> None:
            if value is None:
                txn.delete(key)
            else:
                txn.put(key, value)

        await self._kv.run(work)

    async def _change(self, old: Inode, new: Inode) -> None:
        """Repair an inode."""
        if self._repair:

            async def work(txn: Transaction) -> None:
                put_inode(txn, old, new)

            await self._kv.run(work)

    async def _path(self, key: bytes) -> str:
        """The path of an entry, as far up as directories know their names."""
        names = [entry_name(key).decode()]
        inode = await get_inode(self._kv.begin(), unpack_id(key, 1))
        while inode is not None and inode.id != ROOT_INODE and len(names) < PATH_BYTES_MAX:
            names.append(inode.name or f"inode {inode.id:x}")
            inode = await get_inode(self._kv.begin(), inode.parent)
        names.append("" if inode is not None else "?")
        return "/".join(reversed(names))
