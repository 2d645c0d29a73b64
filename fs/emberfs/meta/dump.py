"""A backup of the metadata as text: one JSON object per line, the first a header with the format and the counts.

    {"emberline_metadata": 1, "next_inode": 4112, "counts": {"inode": 5, "entry": 2, ...}}
    {"row": "inode", "id": 16, "kind": 1, ..., "layout": {"inline": "aGVsbG8="}}
    {"row": "entry", "parent": 1, "name": "a", "inode": 16, "kind": 1}

Sessions are not in it: they belong to a process. Counters are not either: loading counts again. Bytes are base64.

Invariants: a load that did not end leaves a KV without a superblock, which no service opens.
Does not know: chunks. A dump is worth something only together with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from ..errors import AlreadyExists, Conflict, StoreFormat
from ..kv.types import KV, Transaction, decode_int, encode_int
from ..types import FIRST_INODE, Chunks, Inline, Inode, Kind
from .keys import (
    FORMAT,
    IDS_KEY,
    SUPERBLOCK_KEY,
    Counter,
    IdLease,
    Intent,
    Superblock,
    TrashRow,
    decode_inode,
    decode_intent,
    decode_trash,
    encode_row,
    entry_key,
    entry_name,
    entry_value,
    garbage_key,
    get_ids,
    inode_key,
    intent_key,
    mtime_key,
    pack_id,
    put_inode,
    rows_of,
    trash_key,
    unpack_id,
    xattr_key,
)
from .scan import pages

DUMP_FORMAT = 1
LOAD_BYTES = 2 << 20
"""Text that is loaded by one transaction."""
LOAD_LINES = 1000

Line = dict[str, Any]

_PREFIXES = {"inode": b"I", "entry": b"D", "time": b"M", "xattr": b"X", "intent": b"T", "garbage": b"G", "trash": b"R"}


class Header(msgspec.Struct, frozen=True):
    """The first line."""

    emberline_metadata: int
    """The format of the lines."""
    next_inode: int
    counts: dict[str, int]
    """Kind of row -> lines."""
    cluster: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    """What the names of a cluster are worth nothing without: see `manager.tables`. Not set: an embedded store."""


async def dump(kv: KV, write_line: Callable[[str], object]) -> None:
    """Hand every line to `write_line`, without line ends. Raises Conflict if the namespace grew or shrank meanwhile."""
    counts = {row: sum([len(page) async for page in pages(kv, prefix)]) for row, prefix in _PREFIXES.items()}
    next_inode = (await get_ids(kv.begin())).next
    header = Header(emberline_metadata=DUMP_FORMAT, next_inode=next_inode, counts=counts)
    write_line(msgspec.json.encode(header).decode())
    for row, prefix in _PREFIXES.items():
        written = 0
        async for page in pages(kv, prefix):
            written += len(page)
            for key, value in page:
                write_line(msgspec.json.encode({"row": row, **describe(row, key, value)}).decode())
        if written != counts[row]:
            raise Conflict("the namespace changed while it was dumped: stop the writers and dump again")


async def load(kv: KV, lines: Iterable[str]) -> Header:
    """Fill an empty namespace from a dump. No service may be running on it. Returns the header.

    Raises AlreadyExists if there are files, StoreFormat if the lines are no dump, a newer one, or not all of one.
    """
    source = iter(lines)
    header = parse_header(next(source, ""))
    await kv.run(_clear)
    counts = dict.fromkeys(_PREFIXES, 0)
    batch: list[Line] = []
    size_bytes = 0
    for text in source:
        line = _parse(text)
        if line.get("row") not in counts:
            raise StoreFormat(f"a damaged line in the dump: {line}")
        counts[line["row"]] += 1
        batch.append(line)
        size_bytes += len(text)
        if size_bytes > LOAD_BYTES or len(batch) == LOAD_LINES:
            await kv.run(_loader(batch))
            batch, size_bytes = [], 0
    await kv.run(_loader(batch))
    if counts != header.counts:
        raise StoreFormat(f"the dump is not whole: it has {counts} and should have {header.counts}")

    async def finish(txn: Transaction) -> None:
        txn.put(IDS_KEY, encode_row(IdLease(next=header.next_inode, swept=header.next_inode)))
        txn.put(SUPERBLOCK_KEY, encode_row(Superblock(format=FORMAT)))

    await kv.run(finish)
    return header


async def _clear(txn: Transaction) -> None:
    """Remove what a fresh namespace has, its superblock too; that comes back last."""
    for begin, end in (rows_of(b"D"), rows_of(b"G"), (inode_key(FIRST_INODE), rows_of(b"I")[1])):
        if await txn.range(begin, end, limit=1):
            raise AlreadyExists("the namespace is not empty: load a dump into a new store")
    txn.delete_range(b"", b"\xff")


def _loader(batch: list[Line]) -> Callable[[Transaction], Any]:
    async def work(txn: Transaction) -> None:
        for line in batch:
            try:
                _restore(txn, line)
            except (KeyError, TypeError, msgspec.ValidationError) as error:
                raise StoreFormat(f"a damaged line in the dump: {line}: {error}") from None

    return work


def parse_header(text: str) -> Header:
    """The first line of a dump. Raises StoreFormat."""
    if (version := _parse(text).get("emberline_metadata")) is None:
        raise StoreFormat("not a metadata dump: its first line is no header")
    if version != DUMP_FORMAT:
        raise StoreFormat(f"a dump of format {version}, and this emberline knows {DUMP_FORMAT}: upgrade emberline")
    try:
        return msgspec.json.decode(text, type=Header)
    except msgspec.DecodeError as error:
        raise StoreFormat(f"the header of the dump is damaged: {error}") from None


def _parse(text: str) -> Line:
    try:
        return msgspec.json.decode(text, type=Line)
    except msgspec.DecodeError as error:
        raise StoreFormat(f"a line of the dump is no JSON object: {error}") from None


# ---- one row


def describe(row: str, key: bytes, value: bytes) -> Line:
    """A row as JSON shows it."""
    match row:
        case "inode":
            return fields(decode_inode(value))
        case "entry":
            name = entry_name(key).decode()
            return {"parent": unpack_id(key, 1), "name": name, "inode": unpack_id(value), "kind": value[8]}
        case "time":
            return {"inode": unpack_id(key, 1), "mtime_ns": decode_int(value)}
        case "xattr":
            return {"inode": unpack_id(key, 1), "name": key[9:].decode(), "value": value}
        case "intent":
            return {"inode": unpack_id(key, 1), **fields(decode_intent(value))}
        case "garbage":
            return {"due_ns": unpack_id(key, 1), "inode": unpack_id(key, 9)}
        case _:
            return {"id": key[1:].decode(), **fields(decode_trash(value))}


def _restore(txn: Transaction, line: Line) -> None:
    """The reverse of `describe`."""
    match line["row"]:
        case "inode":
            put_inode(txn, None, _struct(line, Inode))
        case "entry":
            key = entry_key(pack_id(line["parent"]), line["name"].encode())
            txn.put(key, entry_value(line["inode"], Kind(line["kind"])))
        case "time":
            txn.put(mtime_key(line["inode"]), encode_int(line["mtime_ns"]))
        case "xattr":
            txn.put(xattr_key(line["inode"], line["name"]), msgspec.convert(line["value"], bytes))
        case "intent":
            txn.put(intent_key(line["inode"]), encode_row(_struct(line, Intent)))
        case "garbage":
            txn.put(garbage_key(line["due_ns"], line["inode"]), b"")
            txn.add(Counter.GARBAGE.value, 1)
        case "trash":
            txn.put(trash_key(line["id"]), encode_row(_struct(line, TrashRow)))
            txn.add(Counter.TRASH.value, 1)


def fields(struct: msgspec.Struct) -> Line:
    """A struct with its names; a layout is {"inline": bytes} or {"chunks": {...}}."""
    line = {name: getattr(struct, name) for name in struct.__struct_fields__}
    layout = line.get("layout")
    if isinstance(layout, Inline):
        line["layout"] = {"inline": layout.data}
    elif isinstance(layout, Chunks):
        line["layout"] = {"chunks": fields(layout)}
    return line


def _struct(line: Line, kind: type[Any]) -> Any:
    """The reverse of `fields`."""
    line = dict(line)
    layout = line.get("layout")
    if layout is not None:
        inline = "inline" in layout
        line["layout"] = Inline(msgspec.convert(layout["inline"], bytes)) if inline else Chunks(**layout["chunks"])
    values = [line[name] for name in kind.__struct_fields__]
    # Through the wire form, so that every field's type is checked.
    return msgspec.msgpack.decode(msgspec.msgpack.encode(values), type=kind)
