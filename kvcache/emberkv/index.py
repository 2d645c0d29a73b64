"""What a namespace holds: pages, segments, tenants, as one value that changes by journal entries only.

Whoever changes it makes an entry, applies it here and writes it to the journal; recovery applies the same entries
again. So what a restart finds is what there was.

Does not know: leases and reservations, which end with the process; files; time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from . import journal
from .journal import AnyEntry, split
from .keys import KEY_BYTES
from .page import places_of
from .segments import Segments
from .table import PageTable


class Index:
    """See the module. `trailing` as in `PageTable`."""

    def __init__(self, trailing: Sequence[int | None], *, segment_bytes: int) -> None:
        self.table = PageTable(trailing)
        self.segments = Segments(segment_bytes=segment_bytes)
        self.tenants: list[str] = []
        self.quotas: list[int] = []
        """Tenant -> bytes that it may hold; 0: as much as there is."""
        self.ttls: list[float] = []
        """Tenant -> seconds after which its pages go that nobody used; 0: that of the namespace."""
        self.ttl_s = 0.0
        """Of the namespace; 0: that of the service."""
        self.listener: Callable[[AnyEntry], None] | None = None
        """Is told each entry that was applied."""

    def tenant(self, name: str) -> int | None:
        """Its number."""
        return self.tenants.index(name) if name in self.tenants else None

    def apply(self, entry: AnyEntry) -> None:
        """Change as the entry says."""
        _APPLY[type(entry)](self, entry)
        if self.listener is not None:
            self.listener(entry)

    def _tenant_added(self, entry: journal.TenantAdded) -> None:
        self.tenants.append(entry.name)
        self.quotas.append(0)
        self.ttls.append(0.0)
        self.table.add_tenant()

    def _put(self, entry: journal.Put) -> None:
        keys, parents, places = split(entry.keys, KEY_BYTES), split(entry.parents, KEY_BYTES), places_of(entry.places)
        tenant, kind, used_s, table = entry.tenant, entry.kind, entry.used_s, self.table
        is_chain = bool(keys) and parents[1:] == keys[:-1]
        if is_chain and table.put_chain(tenant, keys, parents[0], kind, places, now_s=used_s):
            self.segments.revive(places)
            return
        for key, parent, place in zip(keys, parents, places, strict=True):
            self._bury(table.any_slot(tenant, key), kind)
            table.put(tenant, key, parent, kind, place, now_s=used_s)
            self.segments.revive([place])

    def _moved(self, entry: journal.Moved) -> None:
        for key, place in zip(split(entry.keys, KEY_BYTES), places_of(entry.places), strict=True):
            slot = self.table.any_slot(entry.tenant, key)
            assert slot is not None
            self._bury(slot, entry.kind)
            self.table.replace(slot, entry.kind, place)
            self.segments.revive([place])

    def _bury(self, slot: int | None, kind: int) -> None:
        """The page that a slot has of a kind, if it has one, is dead."""
        old = None if slot is None else self.table.unplace(slot, kind)
        if old is not None:
            self.segments.bury(old)

    def _evicted(self, entry: journal.Evicted) -> None:
        for key in split(entry.keys, KEY_BYTES):
            slot = self.table.any_slot(entry.tenant, key)
            assert slot is not None
            for place in self.table.remove(slot):
                self.segments.bury(place)

    def _unplaced(self, entry: journal.Unplaced) -> None:
        for key in split(entry.keys, KEY_BYTES):
            self._bury(self.table.any_slot(entry.tenant, key), entry.kind)

    def _segment_added(self, entry: journal.SegmentAdded) -> None:
        self.segments.next_id = entry.id
        self.segments.add(entry.writer, entry.size_bytes)

    def _segment_sealed(self, entry: journal.SegmentSealed) -> None:
        self.segments.seal(self.segments.by_id[entry.id], entry.end)

    def _segment_retired(self, entry: journal.SegmentRetired) -> None:
        segment = self.segments.by_id[entry.id]
        self.segments.retire(segment)
        self.table.forget_segment(entry.id)

    def _pinned(self, entry: journal.Pinned) -> None:
        for key in split(entry.keys, KEY_BYTES):
            slot = self.table.slot(entry.tenant, key)
            if slot is not None:
                self.table.pin(slot, entry.until_s)

    def _quota_set(self, entry: journal.QuotaSet) -> None:
        self.quotas[entry.tenant] = entry.limit_bytes

    def _ttl_set(self, entry: journal.TtlSet) -> None:
        if entry.tenant is None:
            self.ttl_s = entry.ttl_s
        else:
            self.ttls[entry.tenant] = entry.ttl_s


_APPLY: dict[type, Callable[[Index, Any], None]] = {
    journal.TenantAdded: Index._tenant_added,
    journal.Put: Index._put,
    journal.Moved: Index._moved,
    journal.Evicted: Index._evicted,
    journal.Unplaced: Index._unplaced,
    journal.SegmentAdded: Index._segment_added,
    journal.SegmentSealed: Index._segment_sealed,
    journal.SegmentRetired: Index._segment_retired,
    journal.Pinned: Index._pinned,
    journal.QuotaSet: Index._quota_set,
    journal.TtlSet: Index._ttl_set,
}
