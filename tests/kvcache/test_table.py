"""The index in memory: what is found, what goes first, and that a replay and a snapshot give the same again."""

from __future__ import annotations

import hashlib
import random
from collections import Counter

import pytest
from emberkv.index import Index
from emberkv.journal import (
    AnyEntry,
    Evicted,
    Moved,
    Put,
    QuotaSet,
    SegmentAdded,
    TenantAdded,
    Unplaced,
    batches,
    encode_batch,
    filling,
    split,
)
from emberkv.keys import ROOT
from emberkv.leases import Leases
from emberkv.page import HEADER_BYTES, PLACE, Place, decode_header, encode_header
from emberkv.snapshot import decode_snapshot, encode_image, image_of
from emberkv.table import PageTable

LENGTH = 1000


def key(*names: object) -> bytes:
    return hashlib.sha256(repr(names).encode()).digest()


class Chains:
    """A table of one tenant whose pages lie one after the other."""

    def __init__(self, trailing: list[int | None] | None = None) -> None:
        self.table = PageTable(trailing or [None])
        self.tenant = self.table.add_tenant()
        self._end = 0

    def place(self) -> Place:
        self._end += HEADER_BYTES + LENGTH
        return Place(1, self._end - HEADER_BYTES - LENGTH, LENGTH, 7)

    def put(self, keys: list[bytes], *, now_s: float = 1.0, kind: int = 0, parent: bytes = ROOT) -> None:
        for each in keys:
            self.table.put(self.tenant, each, parent, kind, self.place(), now_s=now_s)
            parent = each

    def pages(self, keys: list[bytes]) -> int:
        return len(self.table.match(self.tenant, b"".join(keys)).slots)


A, B, C, D = (key(name) for name in "ABCD")


def test_the_longest_prefix_is_found() -> None:
    chains = Chains()
    chains.put([A, B, C])
    assert chains.table.match(0, b"".join([A, B, C])).reason == "whole"
    assert chains.pages([A, B, D, C]) == 2
    found = chains.table.match(0, b"".join([D, A]))
    assert (list(found.slots), found.ends, found.reason) == ([], [], "miss")
    assert chains.pages([]) == 0
    assert chains.table.live_bytes == 3 * (HEADER_BYTES + LENGTH)


def test_tenants_do_not_see_each_other() -> None:
    chains = Chains()
    other = chains.table.add_tenant()
    chains.put([A])
    assert len(chains.table.match(other, A).slots) == 0


def test_a_run_of_slots_ends_where_the_chain_goes_on_elsewhere() -> None:
    chains = Chains()
    other = chains.table.add_tenant()
    trunk, branch = [key(f"trunk {each}") for each in range(40)], [key(f"branch {each}") for each in range(40)]
    chains.put(trunk)
    chains.put(branch, parent=trunk[19])
    chains.tenant = other
    chains.put([*trunk[:20], *branch])  # Slots in a row, of another tenant's pages with the same keys.
    for tenant in (0, other):
        found = chains.table.match(tenant, b"".join([*trunk[:20], *branch, A]))
        assert [chains.table.keys[slot] for slot in found.slots] == [*trunk[:20], *branch]
        assert {chains.table.tenant[slot] for slot in found.slots} == {tenant}
        assert (found.ends, found.reason) == ([found.slots[-1]], "miss")
    chains.tenant = 0
    assert chains.pages([*trunk[:20], *trunk[21:]]) == 39  # What hangs elsewhere is found, and all of it is held:
    ends = chains.table.match(0, b"".join([*trunk[:20], *branch[:5], *trunk[20:]])).ends
    assert ends == [chains.table.slot(0, branch[4]), chains.table.slot(0, trunk[39])]


@pytest.mark.parametrize("there", [0, 1, 511, 512, 513, 1500, 1600])
def test_a_long_chain_is_found_up_to_its_first_key_that_is_not_there(there: int) -> None:
    chains = Chains()
    keys = [key(f"long {each}") for each in range(1600)]
    chains.put(keys[:there])
    found = chains.table.match(0, b"".join(keys))
    assert list(found.slots) == list(range(there))
    assert found.reason == ("whole" if there == len(keys) else "miss")
    assert chains.table.packed(found.slots, 0) == chains.table.places[0][:there].tobytes()


@pytest.mark.parametrize("seed", range(8))
def test_a_match_finds_what_looking_up_each_key_finds(seed: int) -> None:
    rng, chains = random.Random(seed), Chains()
    table = chains.table
    table.add_tenant()
    known: list[list[bytes]] = [[]]
    for step in range(300):
        chains.tenant = rng.randrange(2)
        before = rng.choice(known)
        before = before[: rng.randrange(len(before) + 1)]
        more = [key(f"{step} {each}") for each in range(rng.choice([1, 3, 20, 50]))]
        chains.put(more, parent=before[-1] if before else ROOT)
        known.append([*before, *more])
        for _ in range(rng.choice([0, 0, 30])):
            slot = table.coldest(chains.tenant, 10.0)
            if slot is not None:
                table.remove(slot)
        if rng.random() < 0.2:
            slot = table.any_slot(chains.tenant, rng.choice(more))
            if slot is not None:
                table.unplace(slot, 0)
        asked = list(rng.choice(known))
        if rng.random() < 0.3:
            asked[rng.randrange(len(asked) + 1) :] = rng.choice(known)[-30:]
        expected = []
        for each in asked:
            slot = table.slot(chains.tenant, each)
            if slot is None or table.place(slot, 0) is None:
                break
            expected.append(slot)
        found = table.match(chains.tenant, b"".join(asked))
        assert list(found.slots) == expected
        assert (found.reason == "whole") == (len(expected) == len(asked))
        assert set(found.ends) <= set(expected) <= table.above(found.ends)


def test_a_damaged_page_hides_what_comes_after_it_until_it_is_put_again() -> None:
    chains = Chains()
    chains.put([A, B, C])
    slot = chains.table.slot(0, B)
    assert slot is not None
    chains.table.unplace(slot, 0)
    assert chains.table.match(0, b"".join([A, B, C])).reason == "damaged"
    assert chains.pages([A, B, C]) == 1
    chains.put([B], parent=A)
    assert chains.pages([A, B, C]) == 3


def test_an_orphan_is_seen_when_its_parent_comes() -> None:
    chains = Chains()
    chains.put([C], parent=B)
    assert chains.table.slot(0, C) is None
    assert chains.pages([C]) == 0
    chains.put([A, B])
    assert chains.pages([A, B, C]) == 3


@pytest.mark.parametrize(
    ("with_state", "usable"), [([], 0), ([1], 2), ([0, 2], 3), ([3], 4), ([0], 1)]
)  # fmt: skip
def test_a_trailing_kind_is_needed_on_the_last_pages_only(with_state: list[int], usable: int) -> None:
    chains = Chains([None, 1])
    keys = [A, B, C, D]
    chains.put(keys)
    for index in with_state:
        chains.put([keys[index]], kind=1)
    found = chains.table.match(0, b"".join(keys))
    assert len(found.slots) == usable
    assert found.reason == ("whole" if usable == 4 else "no state")


def test_a_leaf_goes_before_its_prefix_and_the_longest_unused_first() -> None:
    chains = Chains()
    table = chains.table
    chains.put([A, B], now_s=1)
    chains.put([C], parent=A, now_s=2)
    slot_b, slot_c = table.slot(0, B), table.slot(0, C)
    assert slot_b is not None and slot_c is not None
    table.touch(slot_b, 3)
    order = []
    while (slot := table.coldest(0, 10)) is not None:
        order.append(table.keys[slot])
        table.remove(slot)
    assert order == [C, B, A]
    assert table.count == 0 and table.live_bytes == 0


@pytest.mark.parametrize("seed", range(4))
def test_leases_of_any_length_end_when_they_should(seed: int) -> None:
    rng, held = random.Random(seed), Counter[int]()
    leases = Leases(lambda slot: held.update([slot]), lambda slot: held.subtract([slot]))
    ends: dict[int, tuple[float, int]] = {}
    now_s = 0.0
    for slot in range(3000):
        now_s += rng.random()
        leases.expire(now_s)
        ends = {lease: end for lease, end in ends.items() if end[0] > now_s}
        assert {slot for slot, count in held.items() if count} == {slot for _, slot in ends.values()}
        first_s = leases.first_end_s
        assert len(leases) == len(ends) and (first_s is None) == (not ends)
        assert first_s is None or now_s < first_s <= min(ends.values())[0]
        duration_s = rng.choice([1.0, 30.0, 30.0, 5 * rng.random()])
        ends[leases.take([slot], owner=1, duration_s=duration_s, now_s=now_s)] = now_s + duration_s, slot
        lease, longer_s = rng.choice(list(ends)), 40 * rng.random()
        match rng.randrange(6):
            case 0:
                assert leases.extend(lease, owner=1, duration_s=longer_s, now_s=now_s)
                ends[lease] = max(ends[lease][0], now_s + longer_s), ends[lease][1]
            case 1:
                assert leases.release([lease], owner=1) == 1
                del ends[lease]


def test_what_is_leased_or_pinned_stays() -> None:
    chains = Chains()
    table = chains.table
    chains.put([A, B])
    chains.put([C], now_s=5)
    slot = table.slot(0, B)
    assert slot is not None
    leases = Leases(table.hold, table.let_go)
    lease = leases.take([slot], owner=1, duration_s=10, now_s=100)
    assert table.coldest(0, 6) == table.slot(0, C)
    leases.expire(109)
    assert len(leases) == 1
    assert leases.release([lease], owner=2) == 0
    assert not leases.extend(lease, owner=2, duration_s=10, now_s=109)
    assert leases.extend(lease, owner=1, duration_s=10, now_s=109)
    leases.expire(115)
    assert table.coldest(0, 6) == table.slot(0, C)
    leases.expire(119)
    assert not leases.extend(lease, owner=1, duration_s=10, now_s=119)
    assert table.coldest(0, 6) == slot
    table.pinned_s[slot] = 50
    assert table.coldest(0, 49) == table.slot(0, C)
    assert table.coldest(0, 51) == slot


def test_recency_is_that_of_whole_prefixes() -> None:
    """Pages go in the order of an LRU list in which every match moves all its pages, the last page first."""
    rng = random.Random(7)
    chains = Chains()
    table = chains.table
    listed: dict[bytes, None] = {}
    for now_s in range(1, 400):
        path = [key(rng.randrange(2))]
        for step in range(rng.randrange(1, 6)):
            path.append(key(path[-1], rng.randrange(3), step))
        parent = ROOT
        for each in path:
            if table.slot(0, each) is None:
                chains.put([each], parent=parent, now_s=now_s)
            parent = each
        slot = table.slot(0, path[-1])
        assert slot is not None
        table.touch(slot, now_s)
        for each in reversed(path):
            listed.pop(each, None)
            listed[each] = None
        while table.count > 40:
            slot = table.coldest(0, 1e9)
            assert slot is not None
            oldest = next(iter(listed))
            assert table.keys[slot] == oldest
            table.remove(slot)
            del listed[oldest]


def filled() -> tuple[Index, list[bytes]]:
    """An index with two tenants, and the log that makes it."""
    log: list[bytes] = []
    index = Index([None, 2], segment_bytes=1 << 20)

    def note(*entries: object) -> None:
        log.append(encode_batch(entries))  # type: ignore[arg-type]
        for entry in entries:
            index.apply(entry)  # type: ignore[arg-type]

    note(TenantAdded("a"), TenantAdded("b"), QuotaSet(1, 500), SegmentAdded(1, 1 << 20, 5), SegmentAdded(2, 1 << 20, 6))
    end = 0
    for tenant in (0, 1):
        parent = ROOT
        for step in range(20):
            place = Place(1, end, LENGTH, step)
            end = place.end
            note(Put(tenant, 0, key(tenant, step), parent, PLACE.pack(*place), 10.0 + step))
            parent = key(tenant, step)
    note(Moved(0, 0, key(0, 19), PLACE.pack(2, 0, LENGTH, 19)))
    note(Put(0, 1, key(0, 19), key(0, 18), PLACE.pack(2, 5000, 50, 1), 40.0))
    note(Evicted(1, key(1, 19)), Evicted(1, key(1, 18)), Unplaced(1, 0, key(1, 5)))
    note(Put(1, 0, key("orphan"), key("nobody"), PLACE.pack(2, 9000, 10, 1), 41.0))
    return index, log


def same(one: Index, other: Index) -> None:
    for tenant in (0, 1):
        chain = [key(tenant, step) for step in range(20)]
        found = [index.table.match(tenant, b"".join(chain)) for index in (one, other)]
        assert len(found[0].slots) == len(found[1].slots) and found[0].reason == found[1].reason
        places = [
            [index.table.place(slot, 0) for slot in each.slots] for index, each in zip((one, other), found, strict=True)
        ]
        assert places[0] == places[1]
    for field in ("count", "live_bytes", "tenant_bytes"):
        assert getattr(one.table, field) == getattr(other.table, field)
    assert one.tenants == other.tenants and one.quotas == other.quotas and one.ttls == other.ttls
    segments = [[(s.id, s.end, s.live_bytes) for s in index.segments] for index in (one, other)]
    assert segments[0] == segments[1]
    order: list[list[bytes]] = []
    for index in (one, other):
        order.append([])
        while (slot := index.table.coldest(0, 1e9)) is not None:
            order[-1].append(index.table.keys[slot])
            index.table.remove(slot)
    assert order[0] == order[1]


def test_a_replay_gives_the_same_index() -> None:
    index, log = filled()
    again = Index([None, 2], segment_bytes=1 << 20)
    for batch in batches(b"".join(log)):
        for entry in batch:
            again.apply(entry)
    same(index, again)


def test_a_snapshot_gives_the_same_index() -> None:
    index, _ = filled()
    again = decode_snapshot(encode_image(image_of(index)), segment_bytes=1 << 20)
    again.table.put(1, key("nobody"), ROOT, 0, Place(2, 12000, 10, 1), now_s=50)
    index.table.put(1, key("nobody"), ROOT, 0, Place(2, 12000, 10, 1), now_s=50)
    assert again.table.slot(1, key("orphan")) is not None
    same(index, again)


@pytest.mark.parametrize("cut", [1, 7, 100])
def test_a_log_that_was_cut_ends_before_the_cut(cut: int) -> None:
    _, log = filled()
    whole = list(batches(b"".join(log)))
    assert list(batches(b"".join(log)[:-cut])) == whole[:-1]
    damaged = bytearray(b"".join(log))
    damaged[-cut] ^= 1
    assert list(batches(damaged)) == whole[:-1]


def test_a_snapshot_that_was_cut_is_none() -> None:
    index, _ = filled()
    with pytest.raises(ValueError):
        decode_snapshot(encode_image(image_of(index))[:-1], segment_bytes=1 << 20)


def test_a_header_is_read_as_it_was_written_and_damage_is_seen() -> None:
    place = Place(3, 4096, 70_000, 12345)
    head = encode_header(place, key=A, parent=B, kind=2, tenant=9)
    assert len(head) == HEADER_BYTES
    found = decode_header(head)
    assert found is not None
    assert (found.place, found.key, found.parent, found.kind, found.tenant) == (place, A, B, 2, 9)
    for index in range(HEADER_BYTES):
        damaged = bytearray(head)
        damaged[index] ^= 0x40
        assert decode_header(damaged) is None


def test_what_is_held_or_pinned_is_looked_at_once() -> None:
    """Old leaves that may not go do not slow the search for one that may, and come up again in their order."""
    chains = Chains()
    table = chains.table
    for number in range(1000):
        chains.put([key(number)], now_s=number)
    slots = [table.slot(0, key(number)) or 0 for number in range(1000)]
    for slot in slots[:300]:
        table.hold(slot)
    for slot in slots[300:600]:
        table.pin(slot, 5000)
    assert table.coldest(0, 1000) == slots[600]
    assert len(table._leaves[0]) == 400 and len(table._pins[0]) == 300
    table.let_go(slots[7])
    assert table.coldest(0, 1000) == slots[7]
    table.pin(slots[300], 0)  # No more.
    table.hold(slots[7])
    assert table.coldest(0, 1000) == slots[300]
    table.hold(slots[300])
    assert table.coldest(0, 5000) == slots[301]


def test_a_ring_of_parents_stays_out_of_reach() -> None:
    chains = Chains()
    chains.put([A], parent=A)
    chains.put([B], parent=C)
    chains.put([C], parent=B)
    assert chains.pages([A]) == chains.pages([B, C]) == 0
    table = chains.table
    slots = [slot for slot in (table.any_slot(0, each) for each in (A, B, C)) if slot is not None]
    for slot in table.below(slots):
        table.remove(slot)
    assert table.count == 0 and list(table.waiting()) == []


def test_all_below_a_page_is_found_children_first() -> None:
    chains = Chains()
    chains.put([A, B, C])
    chains.put([D, key("e")], parent=A)
    table = chains.table
    for again in (table, decode_snapshot(encode_image(image_of(index_of(table))), segment_bytes=1 << 20).table):
        slots = {each: again.slot(0, each) or 0 for each in (A, B, C, D, key("e"))}
        below = again.below([slots[B], slots[A]])
        assert sorted(below) == sorted(slots.values())
        order = {slot: at for at, slot in enumerate(below)}
        assert order[slots[C]] < order[slots[B]] < order[slots[A]] and order[slots[key("e")]] < order[slots[D]]
        for slot in below:
            again.remove(slot)
        assert again.count == 0


def test_what_lies_in_a_segment_is_known_without_a_look_at_all_pages() -> None:
    rng, table, ends = random.Random(5), PageTable([None, 2]), Counter[int]()
    table.add_tenant()
    names = [key(number) for number in range(60)]
    for _ in range(3000):
        name, kind, segment = rng.choice(names), rng.randrange(2), rng.randint(1, 6)
        slot = table.any_slot(0, name)
        if slot is not None and rng.random() < 0.3:
            table.remove(slot)
        elif slot is not None and rng.random() < 0.3:
            table.unplace(slot, kind)
        else:
            ends[segment] += HEADER_BYTES + LENGTH
            table.put(0, name, ROOT, kind, Place(segment, ends[segment], LENGTH, 7), now_s=1.0)
        if rng.random() < 0.01:
            table = decode_snapshot(encode_image(image_of(index_of(table))), segment_bytes=1 << 20).table
    for segment in range(1, 7):
        found = [
            (place.offset, slot, kind)
            for slot in map(int, table.slots())
            for kind in range(2)
            if (place := table.place(slot, kind)) is not None and place.segment == segment
        ]
        assert table.in_segment(segment) == [(slot, kind) for _, slot, kind in sorted(found)]
        table.forget_segment(segment)
        assert table.in_segment(segment) == []


def index_of(table: PageTable) -> Index:
    index = Index(table.trailing, segment_bytes=1 << 20)
    index.apply(TenantAdded("t"))
    for segment in range(1, 7):
        index.apply(SegmentAdded(segment, 1 << 20, segment))
    index.table = table
    return index


@pytest.mark.parametrize("size", [0, 1, 4080, 4087, 4088, 4095, 4096, 5000])
def test_filling_makes_a_log_end_where_a_sector_does_and_means_nothing(size: int) -> None:
    batch = encode_batch([TenantAdded("x" * size)])
    log = b"".join(each + filling(len(each), 4096) for each in (batch, batch))
    assert len(log) % 4096 == 0
    assert list(batches(log)) == [[TenantAdded("x" * size)]] * 2


@pytest.mark.parametrize("seed", range(20))
def test_a_chain_that_is_put_at_once_is_as_if_each_page_was(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(seed)
    whole, single = (Index([None, None], segment_bytes=1 << 20) for _ in range(2))
    monkeypatch.setattr(single.table, "put_chain", lambda *_, **__: False)

    def apply(*entries: AnyEntry) -> None:
        for entry in entries:
            whole.apply(entry)
            for each in single_pages(entry) if isinstance(entry, Put) else [entry]:
                single.apply(each)

    apply(TenantAdded("a"), TenantAdded("b"), *(SegmentAdded(number, 1 << 20, number) for number in (1, 2, 3)))
    ends = dict.fromkeys((1, 2, 3), 0)
    for now_s in range(1, 60):
        tenant, word = draw.randrange(2), [draw.randrange(3) for _ in range(draw.randint(1, 12))]
        names = [key(*word[: end + 1]) for end in range(len(word))]
        begin = draw.randrange(len(names))  # From somewhere on: the ones before may be there, or come, or never do.
        keys, parents = names[begin:], [ROOT, *names][begin : len(names)]
        if draw.random() < 0.1:
            parents[0] = keys[-1]
        segments = sorted(draw.choices([1, 2, 3], k=len(keys)))
        places = []
        for segment in segments:
            places.append(PLACE.pack(segment, ends[segment], LENGTH, draw.randrange(1 << 32)))
            ends[segment] += HEADER_BYTES + LENGTH
        apply(Put(tenant, draw.randrange(2), b"".join(keys), b"".join(parents), b"".join(places), float(now_s)))
        for _ in range(draw.randrange(4)):
            slot = whole.table.coldest(tenant, now_s)
            assert slot == single.table.coldest(tenant, now_s)
            if slot is not None:
                apply(Evicted(tenant, whole.table.keys[slot]))
    for index in (whole, single):
        index.table.spread_stamps()
    ours, theirs = whole.table, single.table
    for column in ("parent", "children", "first", "next", "before", "used_s", "held", "pinned_s", "tenant", "keys"):
        assert getattr(ours, column) == getattr(theirs, column), column
    assert (ours.count, ours.live_bytes, ours.tenant_bytes) == (theirs.count, theirs.live_bytes, theirs.tenant_bytes)
    assert (ours._slots, ours._waiting, ours._awaited) == (theirs._slots, theirs._waiting, theirs._awaited)
    assert (ours._is_there, ours._laid) == (theirs._is_there, theirs._laid)
    assert [each.tolist() for each in ours.places] == [each.tolist() for each in theirs.places]
    assert ours._key_words.tolist() == theirs._key_words.tolist()
    assert list(whole.segments) == list(single.segments)


def single_pages(entry: Put) -> list[Put]:
    """The same, one by one."""
    columns = zip(split(entry.keys, 32), split(entry.parents, 32), split(entry.places, PLACE.size), strict=True)
    return [Put(entry.tenant, entry.kind, *each, entry.used_s) for each in columns]
