"""Rows as an operator's programs read them, through any metadata server: for dump, fsck and the names of damaged files.

The cluster manager's tables in the same KV are shown, too. A reply is one page, so the service is never busy with one
for long, and keeps nothing between two.

Does not know: what the rows are for.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..errors import LimitExceeded
from ..messages import ReadRows, RowsRead
from .state import MetaState

PAGE_ROWS = 1000
REPLY_BYTES_MAX = 4 << 20
"""A reply is over this by one row at most."""
END = b"\xff\xff"
"""Behind the rows of the metadata and of the manager."""


async def read_rows(state: MetaState, request: ReadRows) -> RowsRead:
    """Serve one page. Raises LimitExceeded for keys of others."""
    if max([request.end, *request.keys]) > END:
        raise LimitExceeded("only rows of the metadata and of the manager are read this way")
    txn = state.kv.begin()
    if request.keys:
        values = await txn.get_many(request.keys[:PAGE_ROWS], snapshot=True)
        return RowsRead(values=values[: _fit(len(value or b"") for value in values)])
    if request.begin >= request.end:
        return RowsRead()
    limit = min(request.limit, PAGE_ROWS)
    rows = await txn.range(request.begin, request.end, limit=limit, reverse=request.reverse, snapshot=True)
    fit = _fit(len(key) + len(value) for key, value in rows)
    return RowsRead(rows=rows[:fit], more=fit < len(rows) or limit == len(rows) < request.limit)


def _fit(sizes_bytes: Iterable[int]) -> int:
    """How many of these go into a reply."""
    count = total_bytes = 0
    for size_bytes in sizes_bytes:
        if total_bytes > REPLY_BYTES_MAX:
            break
        count, total_bytes = count + 1, total_bytes + size_bytes
    return count
