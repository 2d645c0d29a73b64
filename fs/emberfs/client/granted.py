"""Reads and writes under grants, of a client that knows no names: where the chunks are is in the grant, too.

Does not know: who made a grant, or whether it is good. The storage servers see to that.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

from ..errors import AccessDenied, EmberError
from ..grants import GrantFile, read_grant
from ..types import FILE_BYTES_MAX, Inode, Kind
from .attachment import Attachment
from .batch import check_buffers, check_count, destinations, note_sums
from .buffers import flat_view
from .core import Core, Range, check_range

GRANTS_MAX = 256
FILES_MAX = 1024
"""That are remembered."""
Item = tuple[int, int, int]
"""(number of a file, offset, length)"""


class GrantedFile:
    """A file as a grant names it: to lanes what an open `File` is."""

    def __init__(self, file: GrantFile) -> None:
        # How long it is the grant knows best. Without links: nobody need ask whether it was removed.
        self.inode_to_read = Inode(file.inode, Kind.FILE, 0, 0, FILE_BYTES_MAX, 0, 0, layout=file.layout)
        self.lane_spec: bytes | None = None
        self.lane_servers: list[str] = []
        self.lane_version = (-1, -1)


class GrantedFiles:
    """Those of one client. Safe from many threads: what one of them forgets is read from the grant again."""

    def __init__(self) -> None:
        self._grants: dict[bytes, dict[int, GrantedFile]] = {}
        self._files: dict[GrantFile, GrantedFile] = {}

    def read(
        self,
        attachment: Attachment,
        grant: bytes,
        items: Sequence[Item],
        into: Sequence[Any],
        sums: array[int] | None,
    ) -> list[int | EmberError]:
        """See `Client.read_granted`: over lanes, and what they do not serve as `fetch` does."""
        core, store, asked = attachment.live(), attachment.store, self._asked(grant, items)
        check_buffers(items, into)
        results: list[Any] | None = None
        if store.lanes is not None:
            files = list(dict.fromkeys([file for file, _, _ in asked]))
            results = store.lanes.read(files, asked, into, code=GrantedFiles.read.__code__, grant=grant, sums=sums)
        if results is None:
            results = [-1] * len(items)
        if left := [place for place, count in enumerate(results) if count == -1]:
            rest, buffers = [items[place] for place in left], [into[place] for place in left]
            found = store.portal.run(self.fetch(core, grant, rest, buffers))
            for place, result in zip(left, found, strict=True):
                results[place] = result
            if sums is not None:
                note_sums(sums, destinations(items, into), results)
        return results

    async def fetch(
        self, core: Core, grant: bytes, items: Sequence[Item], into: Sequence[Any]
    ) -> list[int | EmberError]:
        """See `Client.read_granted`."""
        views = destinations(items, into)
        asked = zip(self._asked(grant, items), views, strict=True)
        ranges = [Range(file.inode_to_read, offset, view, "") for (file, offset, _), view in asked]
        return await core.read_ranges(ranges, grant=grant)

    async def write(self, core: Core, grants: Sequence[bytes], items: Sequence[tuple[int, int, Any]]) -> None:
        """See `Client.write_granted`."""
        check_count(items)
        files = {number: file for grant in grants for number, file in self._files_of(grant).items()}
        ranges = []
        for number, offset, data in items:
            if number not in files:
                raise AccessDenied(f"no grant is for file {number}")
            payload = flat_view(data)
            check_range(offset, len(payload))
            if payload:
                ranges.append(Range(files[number].inode_to_read, offset, payload, ""))
        await core.write_ranges(ranges, grants)

    def _asked(self, grant: bytes, items: Sequence[Item]) -> list[tuple[GrantedFile, int, int]]:
        """Raises AccessDenied, LimitExceeded."""
        check_count(items)
        files = self._files_of(grant)
        try:
            return [(files[number], offset, length) for number, offset, length in items]
        except KeyError as missing:
            raise AccessDenied(f"the grant is not for file {missing}") from None

    def _files_of(self, grant: bytes) -> dict[int, GrantedFile]:
        """By number. Raises AccessDenied."""
        found = self._grants.get(grant)
        if found is None:
            if len(self._grants) >= GRANTS_MAX:
                self._grants = {}
            if len(self._files) >= FILES_MAX:
                self._files = {}
            known, found = self._files, {}
            for file in read_grant(grant).files:
                if (there := known.get(file)) is None:
                    there = known[file] = GrantedFile(file)
                found[file.number] = there
            self._grants[grant] = found
        return found
