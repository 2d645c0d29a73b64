"""Reads of a store that is in this very process: by the caller's thread, past the services, and in one native call.

What a lane is to the servers of a cluster, without a server: the same table of extents, the same checks, and the same
rule for what cannot be served at once. `client.batch` and the engine are the slow twin.

Does not know: whose store it is. Who gives the store away, or closes it, has had its targets clear their mirrors.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from types import CodeType
from typing import Any

from ..engine.extents import Mirror
from ..ledger import Ledger
from ..runtime import Runtime
from ..striping import chains_of
from ..types import Chunks
from .client import NO_SUMS, LaneFile, packed, slot
from .native import native
from .server import TABLE_BYTES_MAX, TableMirror

_VERSION = 1
"""Of all chains, each of which is one target and stays so."""
_LANE_VERSION = _VERSION, -1
"""That of no `LaneReader`: when a server owns the store, files are packed anew."""
_FOREVER_NS = (1 << 63) - 1


class InlineReader:
    """The table of all targets of one store. Any number of threads may read."""

    def __init__(self, runtime: Runtime, ledger: Ledger, chains: Iterable[int]) -> None:
        """Only where there is a `native` part."""
        self._runtime = runtime
        self._ledger = ledger
        self._table: Any = native.Server(TABLE_BYTES_MAX, 0, 0)
        self._table.lease(_FOREVER_NS)
        for chain in chains:
            self._table.allow(chain, _VERSION)

    def mirror(self, chain: int) -> Mirror:
        """Where the target of `chain` puts its extents."""
        return TableMirror(self._table, chain)

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
        """See `LaneReader.read`. A grant is for others to look at."""
        if grant:
            return None
        is_any = False
        for file in files:
            if file.lane_version != _LANE_VERSION:
                file.lane_spec, file.lane_version = _spec(file), _LANE_VERSION
            is_any = is_any or file.lane_spec is not None
        if not is_any:
            return None
        began_s = self._runtime.now_s()
        try:
            buffers = list(into) if isinstance(into, tuple) else into
            counts: list[int] = self._table.read(items, buffers, "lane_spec", NO_SUMS if sums is None else sums)
        except (BufferError, TypeError, ValueError, OverflowError):
            return None  # Whoever reads it otherwise says what is wrong with the arguments.
        if -1 not in counts:
            # Else whoever reads the rest notes all of it.
            self._ledger.note(code, self._runtime.now_s() - began_s)
        return counts

    def close(self) -> None:
        """Nothing is held for readers."""

    def forget_after_fork(self) -> None:
        """In the child: the same."""


def _spec(file: LaneFile) -> bytes | None:
    inode = file.inode_to_read
    if inode is None or not isinstance(inode.layout, Chunks):
        return None
    return packed(inode, [slot(_VERSION, chain, 0) for chain in chains_of(inode.layout)])
