"""Readers and writers of a KV cache on a real cluster: their certificates do what grants name, and nothing else.

Run: pytest tests/e2e/test_kv_grants.py
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import itertools
import json
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import emberfs
import emberkv
import pytest
from emberfs.checksum import crc32c
from emberfs.cluster.joining import join_cluster
from emberfs.cluster.local import LocalCluster
from emberfs.cluster.waiting import wait_until
from emberfs.errors import AccessDenied, GrantExpired, ProtocolError
from emberfs.grants import read_grant, renew, sign
from emberfs.messages import ListChunks, ReadChunks, RemoveChunks, TruncateChunk, WriteChunks
from emberfs.striping import chains_of
from emberfs.transport.certificates import issue
from emberfs.transport.grant_keys import read_keys
from emberfs.types import Chunks, chunk_id
from emberkv import messages
from emberkv.adapters.door import Door
from emberkv.adapters.settings import Settings
from emberkv.grants import WRITE_S, WRITE_SLACK_S
from emberkv.hit import GRANT_PAGES, Hit
from emberkv.keys import ROOT
from emberkv.page import HEADER_BYTES, places_of
from emberkv.segments import SECTOR_BYTES
from emberkv.writing import SLAB_BYTES
from msgspec.structs import replace

from tests.e2e.test_lanes import lane_counts
from tests.fs.cli_run import emberline
from tests.fs.stores import needs_native
from tests.kvcache.serving import Server

PAGE_BYTES = 40_000
"""Pages begin and end in the middle of granules, next to each other, and some lie in two chunks."""
NAMESPACE = emberkv.Namespace(
    model="grants", dtype="bf16", layout="mla", page_tokens=4, kinds=(emberkv.Kind("kv", payload_bytes=PAGE_BYTES),)
)
PAGES = 80
"""More than one grant is for."""


def page(key: bytes) -> bytes:
    return hashlib.sha256(key).digest() * (PAGE_BYTES // 32)


@dataclass
class Place:
    """A cluster, a service on it, and who may come."""

    cluster: LocalCluster
    address: str
    credentials: Path

    def connect(self, tenant: str, person: str, **settings: Any) -> emberkv.KVCache:
        """`person`: whose certificate."""
        directory = str(self.credentials / person)
        return emberkv.connect(
            self.address, NAMESPACE, tenant=tenant, token=f"token of {tenant}", tls=directory, credentials=directory,
            grants=True, store=self.url(person), **settings,
        )  # fmt: skip

    def store(self, person: str, **settings: Any) -> emberfs.Client:
        return emberfs.connect(self.url(person), credentials=str(self.credentials / person), **settings)

    def url(self, person: str) -> str:
        """One for each: a process has one connection to a URL, with the certificate of who was first."""
        orders = list(itertools.permutations(self.cluster.url.removeprefix("ember://").split(",")))
        return "ember://" + ",".join(orders[["client", "acme", "other", "any", "writer", "stranger"].index(person)])

    def key(self) -> bytes:
        return read_keys(self.cluster.directory / "grants.keys")[0]


@pytest.fixture(scope="module")
def place(cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    directory = tmp_path_factory.mktemp("grants")
    people = {"client": "client", "other": "reader:other", "any": "reader", "service": "kv"}
    people |= {"writer": "writer:acme", "stranger": "writer:other"}
    for name, role in people.items():
        issue(cluster.directory / "ca", [name, "127.0.0.1"], role=role, into=directory / name, now_s=time.time())
    command = ("cluster", "token", "--role", "reader", "--tenant", "acme", "--dir", cluster.directory)
    (token,) = emberline(*command).stdout.split()
    manager = cluster.url.removeprefix("ember://").split(",")[0]
    join_cluster(token, manager, into=directory / "acme", names=["desk"])
    digests = {name: [hashlib.sha256(f"token of {name}".encode()).hexdigest()] for name in ("acme", "other")}
    (directory / "tenants.json").write_text(json.dumps({"operators": [], "tenants": digests}))
    keys = str(cluster.directory / "grants.keys")
    server = Server(
        cluster.url, 256 << 20, tenants=str(directory / "tenants.json"),
        more=("--grants", keys, "--tls", str(directory / "service")),
    )  # fmt: skip
    yield Place(cluster, server.address, directory)
    server.end()


@pytest.fixture(scope="module")
def hit(place: Place) -> Iterator[Hit]:
    """What a full client of a tenant matched, and sends to others of it."""
    with place.connect("acme", "client") as cache, place.connect("other", "client") as neighbour:
        keys = cache.keys(list(range(PAGES * NAMESPACE.page_tokens)))
        cache.put(keys, [page(key) for key in keys], durable="committed")
        theirs = neighbour.keys(list(range(PAGES * NAMESPACE.page_tokens)))
        neighbour.put(theirs, [page(key) for key in theirs], durable="committed")
        yield cache.match(keys, lease_s=600)


def pages(cache: emberkv.KVCache, hit: Hit) -> list[bool]:
    """Which pages of a hit are there; they are right."""
    buffers = [bytearray(PAGE_BYTES) for _ in range(hit.pages)]
    done = cache.get_into(hit, buffers)
    assert all(bytes(buffer) == page(key) for buffer, key, good in zip(buffers, hit.keys, done, strict=True) if good)
    return done


@pytest.mark.parametrize("shares_memory", [True, False], ids=["shm", "tcp"])
def test_another_process_of_the_tenant_reads_under_the_hit(place: Place, hit: Hit, shares_memory: bool) -> None:
    sent = hit.encode()
    with place.connect("acme", "acme", shares_memory=shares_memory) as reader:
        for _ in range(2):
            assert pages(reader, Hit.decode(sent)) == [True] * PAGES, reader.refusal
        assert pages(reader, reader.match(hit.keys)) == [True] * PAGES, "of its own match"
        (alone,) = reader.lookup(hit.keys[70:71])
        assert alone is not None
        assert reader.get(alone) == [page(hit.keys[70])]
        assert reader.refusal == ""


@needs_native
def test_lanes_serve_readers_and_check(place: Place, hit: Hit) -> None:
    with place.connect("acme", "acme") as reader:
        assert all(pages(reader, hit))  # Connects, and warms the servers up.
        before = lane_counts(place.cluster)
        assert all(pages(reader, hit))
        after = lane_counts(place.cluster)
        assert after["emberline_lane_bytes"] - before["emberline_lane_bytes"] > 10 * PAGE_BYTES, "of two servers"


def test_a_reader_prefetches_layer_by_layer(hit: Hit, reader: emberkv.KVCache) -> None:
    buffers = [bytearray(PAGE_BYTES) for _ in range(PAGES)]
    assert reader.prefetch(hit, buffers, layers=4).wait() == [True] * PAGES
    assert [bytes(buffer) for buffer in buffers] == [page(key) for key in hit.keys]


def test_what_is_gone_is_a_miss_and_no_refusal(place: Place) -> None:
    with place.connect("acme", "client") as cache:
        keys = cache.keys([9] * 3 * NAMESPACE.page_tokens)
        cache.put(keys, [page(key) for key in keys], durable="committed")
        hit = cache.match(keys)
        segment = places_of(hit.places[0])[0].segment
        with place.store("client") as store, place.connect("acme", "acme") as reader:
            assert pages(reader, hit) == [True] * 3
            (directory,) = (name for name, _ in store.list("/kv") if name.startswith("grants"))
            store.truncate(f"/kv/{directory}/segments/{segment:08x}", 0)  # As the service does with one that is dead.
            assert pages(reader, hit) == [False] * 3
            assert reader.refusal == ""


# ---- what is refused, over lanes and over TCP


@pytest.fixture(params=[True, False], ids=["shm", "tcp"])
def reader(place: Place, request: pytest.FixtureRequest) -> Iterator[emberkv.KVCache]:
    """A reader of the tenant."""
    with place.connect("acme", "acme", shares_memory=request.param) as reader:
        yield reader


def refused(cache: emberkv.KVCache, hit: Hit, why: str) -> None:
    """All pages are misses, and it is said why."""
    assert pages(cache, hit) == [False] * hit.pages
    assert why in cache.refusal


def test_a_tampered_grant_is_a_miss_with_a_reason(hit: Hit, reader: emberkv.KVCache) -> None:
    assert all(pages(reader, hit))
    for at in (9, 70, len(hit.grants[0]) - 1):  # The expiry, a file, the signature.
        changed = hit.grants[0][:at] + bytes([hit.grants[0][at] ^ 4]) + hit.grants[0][at + 1 :]
        tampered = replace(hit, grants=(changed, *hit.grants[1:]))
        assert pages(reader, tampered) == [False] * GRANT_PAGES + [True] * (PAGES - GRANT_PAGES)
        assert "was not made with a key" in reader.refusal
    assert all(pages(reader, hit)), "the connection is none the worse"


def test_an_expired_grant_is_a_miss_and_a_renewed_one_is_not(place: Place, hit: Hit, reader: emberkv.KVCache) -> None:
    over = replace(hit, grants=tuple(renew(grant, place.key(), expires_s=1) for grant in hit.grants))
    refused(reader, over, "has expired")
    renewed = reader.extend(over, lease_s=1200)
    assert renewed is not None
    assert all(pages(reader, renewed))
    assert read_grant(renewed.grants[0]).expires_s > read_grant(hit.grants[0]).expires_s
    with pytest.raises(AccessDenied, match="another lease"):
        reader.extend(replace(hit, lease=hit.lease + 1))
    with pytest.raises(AccessDenied, match="was not made"):
        reader.extend(replace(hit, grants=(hit.grants[0][:-1] + bytes([hit.grants[0][-1] ^ 1]),)))


def test_a_grant_is_of_no_use_to_another_tenant(place: Place, hit: Hit, reader: emberkv.KVCache) -> None:
    """Stolen as it went by, and shown on a connection of somebody else's, while its owner's goes on."""
    assert all(pages(reader, hit))
    with place.connect("other", "other") as thief:
        refused(thief, hit, "another tenant's")
        own = thief.match(thief.keys(list(range(PAGES * NAMESPACE.page_tokens))))
        assert all(pages(thief, own))
        refused(reader, own, "another tenant's")
        refused(thief, replace(hit, grants=own.grants), "the grant is")
    with place.connect("acme", "any") as trusted:
        assert all(pages(trusted, hit)), "a certificate that is not of one tenant"


def test_a_reader_without_a_grant_reads_nothing(hit: Hit, reader: emberkv.KVCache) -> None:
    refused(reader, replace(hit, grants=()), "may not send")
    swapped = replace(hit, grants=(hit.grants[1], hit.grants[0]))
    refused(reader, swapped, "the grant is")


@pytest.mark.parametrize("shares_memory", [True, False], ids=["shm", "tcp"])
def test_a_range_one_byte_too_long_is_refused(place: Place, hit: Hit, shares_memory: bool) -> None:
    """A page in the middle of others', whose ends are in the middle of granules that servers verify whole."""
    segment, offset, length, _ = places_of(hit.places[0])[5]
    file = {file.number: file for file in read_grant(hit.grants[0]).files}[segment]
    end = offset + HEADER_BYTES + length
    alone = sign(
        place.key(), tenant="acme", lease=1, expires_s=1 << 40, files={segment: file}, ranges=[(segment, offset, end)]
    )
    with place.store("acme", shares_memory=shares_memory) as store:
        memory = store.buffer(3 * PAGE_BYTES)
        for _ in range(2):  # The second time over a lane, if there are any.
            memory[:] = b"\xee" * len(memory)
            whole = memory[PAGE_BYTES : PAGE_BYTES + end - offset]
            sums = array("I", [0])
            assert store.read_granted(alone, [(segment, offset, len(whole))], [whole], sums=sums) == [len(whole)]
            assert sums[0] == crc32c(whole)
            with pytest.raises(ValueError, match="1 items need as many buffers, not 2"):
                store.read_granted(alone, [(segment, offset, len(whole))], [whole, whole])
            assert bytes(whole[HEADER_BYTES:]) == page(hit.keys[5])
            assert set(bytes(memory[:PAGE_BYTES]) + bytes(memory[PAGE_BYTES + len(whole) :])) == {0xEE}
            for begin, size in ((offset, end - offset + 1), (offset - 1, 2), (end - 1, 2), (end, 1), (0, 1)):
                memory[:] = b"\xee" * len(memory)
                with pytest.raises(AccessDenied, match="other bytes"):
                    store.read_granted(alone, [(segment, begin, size)], [memory[:size]])
                assert set(bytes(memory)) == {0xEE}
        with pytest.raises(AccessDenied, match="not for file"):
            store.read_granted(alone, [(segment + 1, 0, 1)], [memory[:1]])


def test_a_program_with_an_event_loop_reads_as_well(place: Place, hit: Hit) -> None:
    segment, offset, length, _ = places_of(hit.places[0])[5]

    async def read(begin: int) -> bytes:
        async with emberfs.connect_async(place.url("acme"), credentials=str(place.credentials / "acme")) as store:
            buffer = bytearray(length)
            assert await store.read_granted(hit.grants[0], [(segment, begin, length)], [buffer]) == [length]
            return bytes(buffer)

    assert asyncio.run(read(offset + HEADER_BYTES)) == page(hit.keys[5])
    with pytest.raises(AccessDenied, match="other bytes"):
        asyncio.run(read(32 << 20))


def test_a_reader_does_nothing_else(place: Place, hit: Hit) -> None:
    """No name, no list, no metadata, no write: of no server."""
    with place.store("client") as store:
        store.put("/secret", b"of the store" * 1000, chunk_size_bytes=1 << 16)
        inode = store.stat("/secret")
        (chain, *_) = chains_of(inode.layout)  # type: ignore[arg-type]
    with place.store("acme", deadline_s=5) as store:
        core = store._attachment.live()
        chunk = chunk_id(inode.id, 0)
        attempts: list[Callable[[], object]] = [
            lambda: store.get("/secret"),
            lambda: store.stat("/secret"),
            lambda: store.list("/"),
            lambda: store.open("/secret"),
            lambda: store.put("/mine", b"text"),
            lambda: store.put("/mine", bytes(100_000)),
            lambda: store.remove("/secret"),
            lambda: store.rename("/secret", "/mine"),
            lambda: store.truncate("/secret", 0),
            store.usage,
            store.space,
            store.collect_garbage,
        ]
        for message, buffers in (
            (ReadChunks([chain], [chunk], [0]), [memoryview(bytearray(9))]),
            (ReadChunks([chain], [chunk], [0], grant=hit.grants[0]), [memoryview(bytearray(9))]),
            (WriteChunks(b"c" * 16, 0, 1, [chain], [chunk], [0], 1 << 16), [memoryview(b"overwritten")]),
            (TruncateChunk(chain, chunk, 0), []),
            (RemoveChunks([chain], [chunk]), []),
            (ListChunks(chain, b"", b"\xff" * 16), []),
        ):
            call = functools.partial(core._chains[chain].call, message, buffers)
            attempts.append(functools.partial(lambda call: store._attachment.store.portal.run(call()), call))
        for attempt in attempts:
            with pytest.raises(AccessDenied, match=r"reader|grant"):
                attempt()
    with place.connect("acme", "acme") as cache:
        keys = cache.keys([7] * NAMESPACE.page_tokens)
        with pytest.raises(AccessDenied, match="reader"):
            cache.put(keys, [page(keys[0])], durable="committed")
    with place.store("client") as store:
        assert store.get("/secret") == b"of the store" * 1000


def test_keys_are_changed_while_everything_runs(place: Place, hit: Hit, reader: emberkv.KVCache) -> None:
    path, old, new = place.cluster.directory / "grants.keys", place.key(), b"n" * 32

    def until(look: Callable[[], bool]) -> None:
        wait_until(lambda: (look(), "servers look at their keys"), say=lambda _: None, timeout_s=60)

    def signed_with(key: bytes) -> Hit:
        return replace(hit, grants=tuple(renew(grant, key, expires_s=(1 << 40) + key[0]) for grant in hit.grants))

    def is_signed_with(key: bytes) -> bool:
        (grant, *_) = reader.match(hit.keys).grants
        return grant == renew(grant, key, expires_s=read_grant(grant).expires_s)

    fresh = signed_with(new)
    refused(reader, fresh, "was not made with a key")
    try:
        path.write_text(f"{old.hex()}\n{new.hex()}\n")
        until(lambda: all(pages(reader, fresh)))
        assert all(pages(reader, hit)), "and the old one"
        path.write_text(f"{new.hex()}\n{old.hex()}\n")
        until(lambda: is_signed_with(new))
        assert all(pages(reader, reader.match(hit.keys)))
        path.write_text(f"{new.hex()}\n")
        until(lambda: not any(pages(reader, signed_with(old))))
        assert "was not made with a key" in reader.refusal
    finally:
        path.write_text(f"{old.hex()}\n")
        until(lambda: is_signed_with(old) and all(pages(reader, reader.match(hit.keys))))


# ---- writers

SLAB_PAGES = SLAB_BYTES // PAGE_BYTES
TOKENS = NAMESPACE.page_tokens


def put(cache: emberkv.KVCache, tokens: range, *, at_once: int, **how: Any) -> list[bytes]:
    """Keys of a chain of new pages, so many of which are put at a time."""
    keys = cache.keys(list(tokens))
    for first in range(0, len(keys), at_once):
        some, parent = keys[first : first + at_once], keys[first - 1] if first else None
        assert cache.put(some, [page(key) for key in some], parent=parent, **how) == ["stored"] * len(some)
    cache.flush()
    return keys


@pytest.mark.parametrize("shares_memory", [True, False], ids=["shm", "tcp"])
def test_a_writer_puts_and_others_of_its_tenant_read(place: Place, shares_memory: bool) -> None:
    """More than a slab, in chunks on every chain; and a little at a time."""
    begin = 100_000 * (1 + shares_memory)
    with place.connect("acme", "writer", shares_memory=shares_memory) as writer:
        chains = [
            put(writer, range(begin, begin + 2 * SLAB_PAGES * TOKENS), at_once=SLAB_PAGES),
            put(writer, range(begin + 50_000, begin + 50_000 + 90 * TOKENS), at_once=3),
            put(writer, range(begin + 70_000, begin + 70_000 + 9 * TOKENS), at_once=3, durable="committed"),
        ]
        for keys in chains:
            assert pages(writer, writer.match(keys)) == [True] * len(keys), writer.refusal
    with place.connect("acme", "acme") as reader, place.connect("other", "stranger") as stranger:
        for keys in chains:
            assert pages(reader, reader.match(keys)) == [True] * len(keys), reader.refusal
            assert stranger.match(keys).pages == 0


@pytest.fixture
def reserved(place: Place) -> Iterator[tuple[emberkv.KVCache, messages.Reserved]]:
    """A writer, and the place for one page that it asked for."""
    with place.connect("acme", "writer") as writer:
        (key,) = writer.keys([next(FRESH)] * TOKENS)
        answer = writer._caller.ask(
            lambda seat: messages.Reserve(seat, 0, key, ROOT, [PAGE_BYTES], False, True), messages.Reserved
        )
        yield writer, answer


FRESH = itertools.count(1_000_000)


def test_a_grant_to_write_is_for_the_segment_of_its_writer(
    place: Place, hit: Hit, reserved: tuple[emberkv.KVCache, messages.Reserved]
) -> None:
    _, answer = reserved
    (mine,), grant = places_of(answer.places), answer.grant
    with place.store("writer") as store, place.store("stranger") as stranger:
        store.write_granted([grant], [(mine.segment, mine.offset, b"x" * mine.length)])
        theirs = places_of(hit.places[0])[0]
        file = {file.number: file for file in read_grant(hit.grants[0]).files}[theirs.segment]
        as_mine = {mine.segment: file._replace(number=mine.segment)}
        to_read = sign(
            place.key(), tenant="acme", lease=1, expires_s=1 << 40, files=as_mine, ranges=[(mine.segment, 0, 1 << 20)]
        )
        for shown, segment, why in (
            ([grant], theirs.segment, "no grant is for file"),
            ([to_read], mine.segment, "is to read"),
            ([grant[:-1] + bytes([grant[-1] ^ 1])], mine.segment, "was not made with a key"),
            ([renew(grant, place.key(), expires_s=1)], mine.segment, "has expired"),
            ([], mine.segment, "no grant is for file"),
        ):
            with pytest.raises(AccessDenied, match=why):
                store.write_granted(shown, [(segment, mine.offset, b"overwritten")])
        with pytest.raises(AccessDenied, match="another tenant's"):
            stranger.write_granted([grant], [(mine.segment, mine.offset, b"overwritten")])
        with pytest.raises(AccessDenied, match="is to write"):
            store.read_granted(grant, [(mine.segment, mine.offset, 9)], [bytearray(9)])
        end = mine.end + -mine.end % SECTOR_BYTES
        store.write_granted([grant], [(mine.segment, end - 1, b"x"), (mine.segment, end, b"")])
        for begin, data in ((end - 1, b"xx"), (end, b"x")):
            with pytest.raises(AccessDenied, match="other bytes"):
                store.write_granted([grant], [(mine.segment, begin, data)])
        assert 0 < read_grant(grant).expires_s - time.time() <= WRITE_S + WRITE_SLACK_S
    with place.connect("acme", "acme") as reader:
        assert all(pages(reader, hit)), "nothing was overwritten"
        with pytest.raises(AccessDenied, match="another lease"):
            reader.extend(replace(hit, grants=(grant,), lease=answer.reservation))


def test_a_writer_that_spoils_its_pages_makes_misses_of_its_own(place: Place, hit: Hit) -> None:
    """It may write where it has written before; whoever reads there finds out."""
    with place.connect("acme", "writer") as writer, place.store("writer") as store:
        keys = put(writer, range(next(FRESH) * TOKENS, next(FRESH) * TOKENS), at_once=1)
        (spoilt,) = places_of(writer.match(keys).places[0])
        (key,) = writer.keys([next(FRESH)] * TOKENS)
        answer = writer._caller.ask(
            lambda seat: messages.Reserve(seat, 0, key, ROOT, [PAGE_BYTES], False, True), messages.Reserved
        )
        assert places_of(answer.places)[0].segment == spoilt.segment
        store.write_granted([answer.grant], [(spoilt.segment, spoilt.offset + HEADER_BYTES + 9, b"spoilt")])
        assert pages(writer, writer.match(keys)) == [False]
        assert pages(writer, hit) == [True] * PAGES


def test_a_writer_that_names_its_write_wildly_blocks_no_chunk(
    place: Place, reserved: tuple[emberkv.KVCache, messages.Reserved]
) -> None:
    """A name that no index can hold would leave a version that is never committed."""
    _, answer = reserved
    (mine,) = places_of(answer.places)
    (file,) = read_grant(answer.grant).files
    index, inside = divmod(mine.offset, file.layout.chunk_size_bytes)
    chain = chains_of(file.layout)[index % file.layout.stripe]
    with place.store("writer") as store:
        core, routes = store._attachment.live(), store._attachment.store.routes
        write = WriteChunks(
            routes.client, 0, 1 << 63, [chain], [chunk_id(file.inode, index)], [inside], file.layout.chunk_size_bytes,
            chain_versions=[routes.chain(chain).version], grants=[answer.grant],
        )  # fmt: skip
        head = core._chains[chain]._head(chain)

        def send(message: WriteChunks) -> object:
            call = store._attachment.store.network.connection(head).call
            return store._attachment.store.portal.run(call(message, [memoryview(bytearray(b"wild"))], timeout_s=10))

        for wild in (
            write,
            replace(write, sequence=-1),
            replace(write, sequence=1, channel=1 << 20),
            replace(write, sequence=1, channel=-1),
            replace(write, sequence=1, slots=[1 << 16]),
        ):
            with pytest.raises(ProtocolError, match="no name for an update"):
                send(wild)
        send(replace(write, sequence=1))
        store.write_granted([answer.grant], [(mine.segment, mine.offset, b"and on")])


def test_a_put_whose_grant_expired_is_put_again(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a writer that was slow: it has another place by then."""
    write, refused = emberfs.Client.write_granted, []

    def once(store: emberfs.Client, *given: Any) -> None:
        if not refused:
            refused.append(given)
            raise GrantExpired("the grant has expired")
        write(store, *given)

    monkeypatch.setattr(emberfs.Client, "write_granted", once)
    with place.connect("acme", "writer") as writer:
        keys = writer.keys([next(FRESH)] * TOKENS)
        assert writer.put(keys, [page(keys[0])], durable="committed") == ["stored"]
        assert refused and pages(writer, writer.match(keys)) == [True]


def test_a_writer_does_nothing_else(place: Place, reserved: tuple[emberkv.KVCache, messages.Reserved]) -> None:
    _, answer = reserved
    (mine,) = places_of(answer.places)
    layout = read_grant(answer.grant).files[0].layout
    with place.store("client") as store:
        store.put("/secret2", b"of the store" * 1000, chunk_size_bytes=1 << 16)
        inode = store.stat("/secret2")
    assert isinstance(inode.layout, Chunks)
    with place.store("writer") as store:
        core = store._attachment.live()
        index, inside = divmod(mine.offset, layout.chunk_size_bytes)
        chunk, chain = (
            chunk_id(read_grant(answer.grant).files[0].inode, index),
            chains_of(layout)[index % layout.stripe],
        )
        secret, where, size = chunk_id(inode.id, 0), chains_of(inode.layout)[0], layout.chunk_size_bytes
        grants = [answer.grant]
        other = next(each for each in core._chains if each != chain)

        def send(message: Any, *buffers: bytes) -> Callable[[], object]:
            call = functools.partial(
                core._chains[chain].call, message, [memoryview(bytearray(each)) for each in buffers]
            )
            return lambda: store._attachment.store.portal.run(call())

        for attempt in (
            lambda: store.get("/secret2"),
            lambda: store.stat("/secret2"),
            lambda: store.open("/mine", "wb").close(),
            lambda: store.put("/mine", bytes(100_000)),
            lambda: store.batch_write([("/secret2", 0, b"overwritten")]),
            lambda: store.remove("/secret2"),
            lambda: store.truncate("/secret2", 0),
            store.space,
            store.collect_garbage,
            send(ReadChunks([where], [secret], [0]), bytes(9)),
            send(WriteChunks(b"", 0, 1, [where], [secret], [0], 1 << 16), b"overwritten"),
            send(WriteChunks(b"", 0, 1, [where], [secret], [0], 1 << 16, grants=grants), b"overwritten"),
            send(WriteChunks(b"", 0, 1, [chain], [chunk], [0], size, True, grants=grants), b"replaced"),
            send(WriteChunks(b"", 0, 1, [chain], [chunk], [inside], size // 2, grants=grants), b"other size"),
            send(WriteChunks(b"", 0, 1, [other], [chunk], [inside], size, grants=grants), b"other chain"),
            send(TruncateChunk(chain, chunk, 0)),
            send(RemoveChunks([chain], [chunk])),
            send(ListChunks(chain, b"", b"\xff" * 16)),
        ):
            with pytest.raises(AccessDenied, match=r"writer|grant"):
                attempt()
    with place.store("client") as store:
        assert store.get("/secret2") == b"of the store" * 1000


def test_an_engine_puts_and_loads_as_a_writer(place: Place) -> None:
    """By the adapters' door, more pages than one grant is for."""
    names = [f"engine {number}".encode() for number in range(PAGES)]
    for person, loads in (("writer", True), ("stranger", False)):
        directory, tenant = str(place.credentials / person), "acme" if loads else "other"
        settings = Settings(
            address=place.address, tenant=tenant, token=f"token of {tenant}",
            store=place.url(person), tls=directory, credentials=directory, grants=True, timeout_s=60.0,
        )  # fmt: skip
        door = Door(settings, NAMESPACE)
        if loads:
            assert door.put(names, [page(name) for name in names]) == ["stored"] * PAGES
        buffers = [bytearray(PAGE_BYTES) for _ in names]
        assert door.load(names, buffers) == [loads] * PAGES
        assert not loads or [bytes(buffer) for buffer in buffers] == [page(name) for name in names]
        assert door.counts.failed == 0
        door.close()
