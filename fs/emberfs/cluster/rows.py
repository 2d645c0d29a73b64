"""The metadata of a cluster as a KV that can only be read, page by page, through its metadata servers.

What reads the rows of an embedded store so reads those of a cluster. But a transaction is not of one moment: each read
is of when it is served. Who compares rows has to look twice.

Does not know: which metadata server answers, or what the rows mean.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import AccessDenied
from ..kv.batch import Batch, Row
from ..kv.buffered import BufferedKV, Reads
from ..messages import ReadRows, RowsRead
from ..runtime import Runtime
from ..transport.types import Connection


class ClusterRows(BufferedKV):
    """An `emberfs.kv.types.KV`; the metadata router tries again what is not answered, so nothing here does."""

    def __init__(self, meta: Connection, runtime: Runtime) -> None:
        super().__init__(runtime, retry_s=0.0)
        self._meta = meta

    async def _fetch(self, keys: Sequence[bytes], version: int | None) -> tuple[int, list[bytes | None]]:
        values: list[bytes | None] = []
        while len(values) < len(keys):
            values += (await self._read(ReadRows(keys=list(keys[len(values) :])))).values
        return 0, values

    async def _scan(
        self, begin: bytes, end: bytes, limit: int, reverse: bool, version: int | None
    ) -> tuple[int, list[Row]]:
        rows: list[Row] = []
        while True:
            reply = await self._read(ReadRows(begin=begin, end=end, limit=limit - len(rows), reverse=reverse))
            rows += reply.rows
            if not reply.more:
                return 0, rows
            begin, end = (begin, rows[-1][0]) if reverse else (rows[-1][0] + b"\x00", end)

    async def _read(self, request: ReadRows) -> RowsRead:
        reply = await self._meta.call(request)
        assert isinstance(reply, RowsRead)
        return reply

    async def _commit(self, reads: Reads, batch: Batch) -> None:
        raise AccessDenied("the metadata of a running cluster is changed by its metadata servers only")

    async def _release(self) -> None:
        """There is nothing to let go of."""
