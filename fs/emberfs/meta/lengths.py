"""Chunks against the rows of their files: is each where its file looks for it, and inside of the file?

What is in the way of being changed (a file that is open, a truncate that is due, a file on its way into chunks) is not
looked at. Missing chunks are no finding: a hole has none, and nobody knows which holes were meant.

Does not know: chunks that have no file (`check`), or whether their bytes are right (the scrub).
"""

from __future__ import annotations

from collections.abc import Collection

from msgspec.structs import replace

from ..errors import Corruption
from ..kv.types import KV, Transaction, decode_int
from ..striping import chains_of
from ..types import Chunks, Inode, describe_chunk, split_chunk_id
from .check import Finding
from .chunks import ClientChunkOps
from .keys import decode_inode, get_ids, grant_key, inode_key, intent_key, length_key, session_range


async def check_lengths(kv: KV, chunks: ClientChunkOps) -> list[Finding]:
    """Findings of kind "chunks", by chain and chunk."""
    findings = []
    end = (await get_ids(kv.begin())).next
    async for chain, page in chunks.listed(0, end):
        txn = kv.begin()
        inodes = await _inodes(txn, {split_chunk_id(chunk)[0] for chunk, _ in page})
        wrong = [
            (chunk, problem)
            for chunk, length in page
            if (problem := _problem(inodes.get(split_chunk_id(chunk)[0]), chain, chunk, length))
        ]
        busy = await _busy(kv.begin(), {split_chunk_id(chunk)[0] for chunk, _ in wrong})
        findings += [
            Finding("chunks", "", f"chunk {describe_chunk(chunk)} on chain {chain} {problem}", False)
            for chunk, problem in wrong
            if split_chunk_id(chunk)[0] not in busy
        ]
    return findings


async def _inodes(txn: Transaction, numbers: Collection[int]) -> dict[int, Inode]:
    """Those that there are, with the length that reports say. Damaged ones are left out."""
    rows = await txn.get_many([inode_key(number) for number in numbers], snapshot=True)
    ends = await txn.get_many([length_key(number) for number in numbers], snapshot=True)
    inodes = {}
    for number, row, end in zip(numbers, rows, ends, strict=True):
        if row is not None:
            try:
                inode = decode_inode(row)
            except Corruption:
                continue
            inodes[number] = replace(inode, length=max(inode.length, decode_int(end)))
    return inodes


def _problem(inode: Inode | None, chain: int, chunk: bytes, length: int) -> str:
    if inode is None:
        return ""
    if not isinstance(inode.layout, Chunks):
        return "is of a file that has no chunks"
    index = split_chunk_id(chunk)[1]
    chains = list(chains_of(inode.layout))
    if (expected := chains[index % len(chains)]) != chain:
        return f"is not where its file looks for it, on chain {expected}"
    end = index * inode.layout.chunk_size_bytes + length
    if length and end > inode.length:
        return f"reaches to {end}, and its file ends at {inode.length}"
    return ""


async def _busy(txn: Transaction, inodes: Collection[int]) -> set[int]:
    """Those that somebody is changing."""
    busy = set()
    for inode in inodes:
        marks = await txn.get_many([intent_key(inode), grant_key(inode)], snapshot=True)
        sessions = await txn.range(*session_range(inode), limit=1, snapshot=True)
        if sessions or any(mark is not None for mark in marks):
            busy.add(inode)
    return busy
