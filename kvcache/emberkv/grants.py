"""Grants for what was matched, or is put: who shows them to the storage servers reads those pages and no others, or
writes into those segments and no others.

A place never holds another page (see `segments`), so a grant that outlives its lease gives away nothing of another
tenant's: what it names is that page or zeros. That it ends is hygiene, and so clocks that differ a little do no harm.
A segment has one writer for ever, so a grant to write, which is for all of it that was handed out, reaches no page that
somebody else put: who misuses it damages pages of its own, and whoever reads them sees that. A chunk that was written
after its file had gone would stay for ever: the file goes after the last grant to write to it.

Does not know: who asks, or whether the lease is still held.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from emberfs import NotFound
from emberfs.errors import AccessDenied
from emberfs.grants import GrantFile, check_grant, renew, sign
from emberfs.runtime import Runtime
from emberfs.transport.grant_keys import GrantKeys

from .files import Files
from .hit import GRANT_PAGES
from .page import HEADER_BYTES, PLACE

WRITE_S = 30
"""A grant to write is good for so long: a writer gets another one with each put."""
WRITE_SLACK_S = 15
"""And for so long behind that, as of readers. Servers' clocks may be behind by as much."""
WRITTEN_S = WRITE_S + 2 * WRITE_SLACK_S
"""After so long nobody writes under it, if the clocks are right."""
SLACK_S = 60
"""A grant is good for so long behind its lease: the clock of a storage server may be ahead."""
SEGMENTS_MAX = 65_536
"""Whose chunks are remembered."""


class Granter:
    """Makes grants of pages, for one service."""

    def __init__(self, keys: GrantKeys, files: Files, runtime: Runtime) -> None:
        self._keys, self._files, self._runtime = keys, files, runtime
        self._known: dict[tuple[str, int], GrantFile] = {}
        """(directory of segments, segment) -> its chunks."""

    async def grants(
        self, segments: str, columns: Sequence[bytes], *, tenant: str, lease: int, lease_s: float
    ) -> list[bytes]:
        """Grants of pages whose places the columns are, one for each kind; each grant is of GRANT_PAGES pages."""
        step = GRANT_PAGES * PLACE.size
        grants, key, expires_s = [], self._keys.keys[0], self._expires_s(lease_s)
        for begin in range(0, len(columns[0]), step):
            ranges = [each for column in columns for each in _ranges(column[begin : begin + step])]
            files = {}
            for number in dict.fromkeys([number for number, _, _ in ranges]):
                file = self._known.get((segments, number)) or await self._locate(segments, number)
                if file is not None:
                    files[number] = file
            there = [each for each in ranges if each[0] in files]
            grants.append(sign(key, tenant=tenant, lease=lease, expires_s=expires_s, files=files, ranges=there))
        return grants

    async def to_write(self, segments: str, ends: Mapping[int, int], *, tenant: str, reservation: int) -> bytes:
        """A grant to write into segments of one writer, each up to its end. Raises NotFound: one of them is gone."""
        files = {}
        for number in ends:
            file = self._known.get((segments, number)) or await self._locate(segments, number)
            if file is None:
                raise NotFound("a segment is not there: put the pages again", f"{segments}/{number:08x}")
            files[number] = file
        ranges = [(number, 0, end) for number, end in ends.items()]
        key, expires_s = self._keys.keys[0], self._expires_s(WRITE_S, WRITE_SLACK_S)
        return sign(key, tenant=tenant, lease=reservation, expires_s=expires_s, files=files, ranges=ranges, writes=True)

    def renewed(self, grants: Sequence[bytes], *, tenant: str, lease: int, lease_s: float) -> list[bytes]:
        """The same for longer. Raises AccessDenied for what we never gave this tenant to read with this lease."""
        for data in grants:
            grant = check_grant(data, self._keys.keys, tenant=tenant)
            if grant.lease != lease or grant.writes:
                raise AccessDenied("the grant is of another lease")
        return [renew(grant, self._keys.keys[0], expires_s=self._expires_s(lease_s)) for grant in grants]

    def _expires_s(self, for_s: float, slack_s: int = SLACK_S) -> int:
        return self._runtime.wall_ns() // 1_000_000_000 + int(for_s) + slack_s

    async def _locate(self, segments: str, number: int) -> GrantFile | None:
        """None: it is gone, or nothing was ever written to it."""
        try:
            located = await self._files.locate(f"{segments}/{number:08x}")
        except NotFound:
            return None
        if located is None:
            return None
        while len(self._known) >= SEGMENTS_MAX:
            del self._known[next(iter(self._known))]
        found = self._known[segments, number] = GrantFile(number, *located)
        return found


def _ranges(places: bytes) -> list[tuple[int, int, int]]:
    """(segment, begin, end) of pages; one for pages that lie one after the other, as they mostly do."""
    ranges = []
    segment = begin = end = 0
    for number, offset, length, _ in PLACE.iter_unpack(places):
        if number != segment or offset != end:
            if segment:
                ranges.append((segment, begin, end))
            segment, begin = number, offset
        end = offset + HEADER_BYTES + length
    if segment:
        ranges.append((segment, begin, end))
    return ranges
