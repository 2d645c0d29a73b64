"""The KV in memory: for simulation and tests, with a modelled durable point.

What `_apply` did is durable, all else is lost in a crash: a simulated machine takes `snapshot()` when it dies, and
starts again with `MemoryKV(runtime, rows=snapshot)`. `persist` stands for the time that an fsync takes; a crash while
it runs loses the commits that wait for it, none of which was acknowledged.

Does not know: files.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from itertools import islice

from sortedcontainers import SortedDict

from ..errors import LimitExceeded
from ..runtime import Runtime
from .batch import Batch, Row, resolve
from .transaction import OptimisticKV


class MemoryKV(OptimisticKV):
    """An ordered transactional KV over a sorted dict."""

    def __init__(
        self,
        runtime: Runtime,
        *,
        rows: Mapping[bytes, bytes] | None = None,
        persist: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """`rows`: a `snapshot` to start from. `persist`: awaited before each group of commits is applied."""
        super().__init__(runtime)
        self._rows: SortedDict = SortedDict(rows or {})
        self._persist = persist

    def snapshot(self) -> dict[bytes, bytes]:
        """A copy of the durable rows: what a restart finds."""
        return dict(self._rows)

    def _get(self, key: bytes) -> bytes | None:
        return self._rows.get(key)  # type: ignore[no-any-return]

    def _scan(self, begin: bytes, end: bytes, limit: int, reverse: bool) -> list[Row]:
        rows = self._rows
        keys = rows.irange(begin, end, inclusive=(True, False), reverse=reverse)
        return [(key, rows[key]) for key in islice(keys, limit)]

    def _may_lead(self) -> bool:
        return self._persist is None

    async def _apply_group(self, group: Sequence[Batch]) -> None:
        if self._persist is not None:
            await self._persist()
        self._apply(group)

    def _apply(self, group: Sequence[Batch]) -> None:
        before: dict[bytes, bytes | None] = {}
        try:
            for batch in group:
                for begin, end in batch.clears:
                    for key in list(self._rows.irange(begin, end, inclusive=(True, False))):
                        before.setdefault(key, self._rows.pop(key))
                for key, write in batch.writes.items():
                    row = self._rows.get(key)
                    before.setdefault(key, row)
                    self._set(key, resolve(write, row))
        except LimitExceeded:
            for key, row in before.items():
                self._set(key, row)
            raise

    def _set(self, key: bytes, row: bytes | None) -> None:
        if row is None:
            self._rows.pop(key, None)
        else:
            self._rows[key] = row
