"""Reading all rows of one kind, a page per transaction, so that no transaction grows old. Not a point in time.

Does not know: what the rows are for.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

from ..kv.types import KV
from .keys import rows_of

PAGE_ROWS = 1000


async def pages(kv: KV, prefix: bytes) -> AsyncIterator[list[tuple[bytes, bytes]]]:
    """Pages of the rows of one letter, in key order. The rows of a page may be deleted while it is held."""
    begin, end = rows_of(prefix)
    while True:
        rows = await kv.begin().range(begin, end, limit=PAGE_ROWS, snapshot=True)
        if rows:
            yield rows
        if len(rows) < PAGE_ROWS:
            return
        begin = rows[-1][0] + b"\0"
