"""Grants: what they cover, and that nobody changes, borrows or outlives one; checked in Python and in C alike.

Run: pytest tests/fs/test_grants.py
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from emberfs.errors import AccessDenied, InvalidPath, LimitExceeded
from emberfs.grants import (
    FILES_MAX,
    GRANT_BYTES_MAX,
    RANGES_MAX,
    TENANT_BYTES_MAX,
    GrantFile,
    check_grant,
    read_grant,
    renew,
    sign,
)
from emberfs.messages import ReadChunks, WriteChunks
from emberfs.messages.base import READER, WRITER
from emberfs.striping import chains_of
from emberfs.transport.codec import message_classes
from emberfs.transport.gate import CHECKS_MAX, GRANTS_MAX, Gate
from emberfs.transport.grant_keys import GrantKeys, read_keys
from emberfs.types import Chunks, chunk_id
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fs.lane_probe import HEAD, MAGIC, READ, LaneProbe, new_server
from tests.fs.stores import needs_native
from tests.fs.test_lane_server import File

KEY, OTHER_KEY = b"k" * 32, b"o" * 32
CHUNK_BYTES = 1 << 16
FILE = GrantFile(3, 7, Chunks(CHUNK_BYTES, 4, 2, 99))
NEIGHBOUR = GrantFile(4, 8, Chunks(CHUNK_BYTES, 4, 2, 1))
FILES = {3: FILE, 4: NEIGHBOUR}
FAR_S = 1 << 40


def signed(
    *ranges: tuple[int, int, int], key: bytes = KEY, tenant: str = "acme", expires_s: int = FAR_S, writes: bool = False
) -> bytes:
    return sign(key, tenant=tenant, lease=5, expires_s=expires_s, files=FILES, ranges=ranges, writes=writes)


def covers(data: bytes, inode: int, begin: int, length: int) -> bool:
    """A read of one chunk."""
    return read_grant(data).covers(inode, begin // CHUNK_BYTES, begin % CHUNK_BYTES, length)


# ---- what it says


def test_a_grant_says_what_was_signed() -> None:
    grant = check_grant(signed((3, 100, 200), (4, 0, 96)), [KEY], tenant="acme")
    assert (grant.tenant, grant.lease, grant.expires_s) == ("acme", 5, FAR_S)
    assert grant.files == (FILE, NEIGHBOUR)
    assert not grant.writes
    assert read_grant(signed((3, 100, 200), writes=True)).writes
    assert read_grant(renew(signed((3, 100, 200), writes=True), KEY, expires_s=9)).writes


def test_a_grant_covers_its_ranges_to_the_byte() -> None:
    data = signed((3, 100, 200), (3, 200, 250), (3, 300, 400), (4, 0, 10))
    assert covers(data, 7, 100, 150), "what touches is one"
    assert covers(data, 7, 399, 1)
    assert covers(data, 7, 250, 0)
    for begin, length in ((99, 1), (100, 151), (249, 2), (200, 150), (399, 2), (400, 1)):
        assert not covers(data, 7, begin, length), (begin, length)
    assert not covers(data, 8, 100, 50)
    assert not covers(data, 9, 0, 1)


def test_a_range_may_lie_in_two_chunks_and_a_read_in_one() -> None:
    grant = read_grant(signed((3, CHUNK_BYTES - 10, CHUNK_BYTES + 10)))
    assert grant.covers(7, 0, CHUNK_BYTES - 10, 10)
    assert grant.covers(7, 1, 0, 10)
    assert not grant.covers(7, 0, CHUNK_BYTES - 10, 11), (
        "what is behind the end of a chunk is another file's, on the disk"
    )
    assert not grant.covers(7, 1, -10, 10)
    assert not grant.covers(7, 1, 0, 11)


@given(st.binary(min_size=1, max_size=8))
def test_what_is_no_grant_is_refused(junk: bytes) -> None:
    for data in (b"", junk, signed((3, 0, 9)) + junk, b"EMG1" + junk * 8):
        with pytest.raises(AccessDenied):
            read_grant(data)


def test_too_much_at_once_is_refused() -> None:
    with pytest.raises(LimitExceeded):
        signed(*[(3, 10 * at, 10 * at + 5) for at in range(RANGES_MAX + 1)])
    with pytest.raises(LimitExceeded):
        signed((3, 0, 1), tenant="t" * (TENANT_BYTES_MAX + 1))
    files = {number: GrantFile(number, number, FILE.layout) for number in range(FILES_MAX + 1)}
    with pytest.raises(LimitExceeded):
        sign(KEY, tenant="", lease=0, expires_s=1, files=files, ranges=[(number, 0, 1) for number in files])


# ---- who made it, for whom, until when


def test_each_changed_byte_is_noticed() -> None:
    data = signed((3, 100, 200))
    for at in range(len(data)):
        with pytest.raises(AccessDenied):
            check_grant(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :], [KEY], tenant="acme")


def test_nothing_long_is_even_looked_at() -> None:
    with pytest.raises(AccessDenied, match="too long"):
        check_grant(bytes(GRANT_BYTES_MAX + 1), [KEY], tenant="")
    ranges = [(file, 20 * at, 20 * at + 9) for at in range(RANGES_MAX // FILES_MAX) for file in range(FILES_MAX)]
    files = {number: GrantFile(number, number, FILE.layout) for number in range(FILES_MAX)}
    longest = sign(KEY, tenant="t" * TENANT_BYTES_MAX, lease=0, expires_s=FAR_S, files=files, ranges=ranges)
    assert len(longest) == GRANT_BYTES_MAX
    assert check_grant(longest, [KEY], tenant="").covers(FILES_MAX - 1, 0, 20, 9)


@needs_native
def test_a_lane_takes_no_grant_to_write(server: Any, file: File) -> None:
    lane = lane_of(server)
    show(lane, signed((3, 100, 200), writes=True))
    assert read_lane(lane, 100, 10) is None
    show(lane, signed((3, 100, 200)))
    assert read_lane(lane, 100, 10) == file.content[100:110]
    lane.close()


@needs_native
def test_a_lane_takes_the_longest_grant(server: Any, file: File) -> None:
    files = {number: GrantFile(number, number, FILE.layout) for number in range(FILES_MAX)}
    ranges = [(number, 20 * at, 20 * at + 9) for at in range(RANGES_MAX // FILES_MAX) for number in range(FILES_MAX)]
    lane, tenant = lane_of(server, "t" * TENANT_BYTES_MAX), "t" * TENANT_BYTES_MAX
    show(lane, sign(KEY, tenant=tenant, lease=0, expires_s=FAR_S, files=files, ranges=ranges))
    assert read_lane(lane, 20, 9) == file.content[20:29]
    assert read_lane(lane, 20, 10) is None
    lane.close()


def test_two_keys_are_accepted_while_they_are_changed() -> None:
    for key in (KEY, OTHER_KEY):
        assert check_grant(signed((3, 0, 9), key=key), [KEY, OTHER_KEY], tenant="acme").lease == 5
    with pytest.raises(AccessDenied, match="not made with a key"):
        check_grant(signed((3, 0, 9)), [OTHER_KEY], tenant="acme")


def test_a_tenant_has_its_own_grants_only() -> None:
    data = signed((3, 0, 9))
    assert check_grant(data, [KEY], tenant="").tenant == "acme"
    with pytest.raises(AccessDenied, match="another tenant"):
        check_grant(data, [KEY], tenant="acm")


def test_a_renewed_grant_is_the_same_for_longer() -> None:
    grant = check_grant(renew(signed((3, 100, 200), expires_s=1), KEY, expires_s=99), [KEY], tenant="acme")
    assert (grant.expires_s, grant.lease, grant.files) == (99, 5, (FILE,))
    assert grant.covers(7, 0, 100, 100)


def test_keys_are_read_again_when_their_file_changes(tmp_path: Path) -> None:
    path = tmp_path / "grants.keys"
    path.write_text(KEY.hex() + "\n")
    keys = GrantKeys(path)
    assert not keys.look()
    fresh = tmp_path / "fresh"
    fresh.write_text(f"{OTHER_KEY.hex()}\n{KEY.hex()}\n")
    fresh.rename(path)
    assert keys.look()
    assert keys.keys == (OTHER_KEY, KEY)
    path.write_text("half a key")
    assert not keys.look()
    assert keys.keys == (OTHER_KEY, KEY), "what is no good changes nothing"


@pytest.mark.parametrize("text", ["", "abc", KEY.hex()[:-2], "\n".join([KEY.hex()] * 5)])
def test_a_file_of_keys_is_looked_at(tmp_path: Path, text: str) -> None:
    (tmp_path / "keys").write_text(text)
    with pytest.raises(InvalidPath):
        read_keys(tmp_path / "keys")
    with pytest.raises(InvalidPath):
        GrantKeys(tmp_path / "nothing")


# ---- on a connection


class Clock:
    """Seconds, by hand."""

    def __init__(self) -> None:
        self.now_s = 1000

    def wall_ns(self) -> int:
        return self.now_s * 1_000_000_000


@pytest.fixture
def keys(tmp_path: Path) -> GrantKeys:
    (tmp_path / "grants.keys").write_text(KEY.hex())
    return GrantKeys(tmp_path / "grants.keys")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def gate(keys: GrantKeys, clock: Clock) -> Gate:
    return Gate(keys, tenant="acme", wall_ns=clock.wall_ns)


def read(grant: bytes, offset: int = 100, chunk: bytes = chunk_id(7, 0)) -> ReadChunks:
    return ReadChunks([1], [chunk], [offset], grant=grant)


def test_a_reader_reads_what_its_grant_covers(gate: Gate) -> None:
    grant = signed((3, 100, 200))
    for _ in range(2):
        gate.check(read(grant), [100])
    for request, lengths in (
        (read(grant), [101]),
        (read(grant, 99), [1]),
        (read(grant, chunk=chunk_id(8, 0)), [100]),
        (read(grant, chunk=b"short"), [100]),
        (read(grant), [100, 100]),
        (read(grant), []),
    ):
        with pytest.raises(AccessDenied, match="grant"):
            gate.check(request, lengths)


def test_a_reader_without_a_grant_reads_nothing(gate: Gate, keys: GrantKeys, clock: Clock) -> None:
    with pytest.raises(AccessDenied, match="takes a grant"):
        gate.check(read(b""), [1])
    with pytest.raises(AccessDenied, match="no keys"):
        Gate(None, tenant="", wall_ns=clock.wall_ns).check(read(signed((3, 100, 200))), [1])
    with pytest.raises(AccessDenied, match="another tenant"):
        Gate(keys, tenant="other", wall_ns=clock.wall_ns).check(read(signed((3, 100, 200))), [1])


def test_a_grant_expires_on_a_connection_that_knows_it(gate: Gate, clock: Clock) -> None:
    grant = signed((3, 100, 200), expires_s=1010)
    gate.check(read(grant), [100])
    clock.now_s = 1010
    with pytest.raises(AccessDenied, match="expired"):
        gate.check(read(grant), [100])
    gate.check(read(renew(grant, KEY, expires_s=1020)), [100])


def test_a_key_that_is_taken_out_is_good_for_nothing(gate: Gate, keys: GrantKeys, tmp_path: Path) -> None:
    grant = signed((3, 100, 200))
    gate.check(read(grant), [100])
    (tmp_path / "grants.keys").write_text(f"{OTHER_KEY.hex()}\n")
    assert keys.look()
    with pytest.raises(AccessDenied, match="was not made with a key"):
        gate.check(read(grant), [100])
    gate.check(read(signed((3, 100, 200), key=OTHER_KEY)), [100])


def test_a_connection_knows_some_grants_and_learns_the_others_again(gate: Gate) -> None:
    grants = [signed((3, 100, 200), expires_s=FAR_S + each) for each in range(GRANTS_MAX + 5)]
    for grant in [*grants, *grants]:
        gate.check(read(grant), [100])


# ---- to write


def write(*grants: bytes, index: int = 0, offset: int = 100, inode: int = 7, **more: Any) -> WriteChunks:
    """Of one item, in a file that is laid out as both are."""
    layout = {7: FILE, 8: NEIGHBOUR}[inode].layout
    chains = chains_of(layout)
    given = {
        "chains": [chains[index % len(chains)]],
        "chunks": [chunk_id(inode, index)],
        "chunk_size_bytes": CHUNK_BYTES,
    }
    return WriteChunks(b"c" * 16, 0, 1, offsets=[offset], grants=list(grants), **(given | more))


def test_a_writer_writes_what_its_grants_cover(gate: Gate) -> None:
    grant = signed((3, 100, 200), (3, CHUNK_BYTES, CHUNK_BYTES + 5), writes=True)
    other = signed((3, 300, 400), (4, 0, 10), writes=True)
    for _ in range(2):
        gate.check(write(grant), [100])
        gate.check(write(grant, index=1, offset=0), [5])
        gate.check(write(grant, other, offset=300), [100])
        gate.check(write(grant, other, inode=8, offset=3, whole_chunks=True), [7])
        gate.check(write(other, grant), [100])
        gate.check(write(grant, other), [100])
    wrong_chain = [chain for chain in range(1, 5) if chain != chains_of(FILE.layout)[0]]
    for request, lengths in (
        (write(grant), [101]),
        (write(grant, offset=99), [1]),
        (write(grant, offset=-1), [1]),
        (write(grant, index=1, offset=0), [6]),
        (write(grant, inode=8, offset=0), [5]),
        (write(grant, other, offset=150), [200]),
        (write(grant, chunks=[b"short"]), [1]),
        (write(grant, chunk_size_bytes=2 * CHUNK_BYTES), [1]),
        *((write(grant, chains=[chain]), [1]) for chain in wrong_chain),
        (write(grant, chains=[]), [1]),
        (write(grant), [1, 1]),
        (write(grant), []),
        (write(grant, replace=True), [1]),
        (write(*[grant] * (CHECKS_MAX + 1)), [1]),
        (write(grant), [0]),
    ):
        with pytest.raises(AccessDenied, match="grant"):
            gate.check(request, lengths)


def test_a_writer_shows_grants_to_write_that_are_good(gate: Gate, clock: Clock) -> None:
    good = signed((3, 100, 200), writes=True)
    for grants, why in (
        ((), "takes a grant"),
        ((good, b""), "takes a grant"),
        ((signed((3, 100, 200)),), "is to read"),
        ((good, signed((3, 100, 200), writes=True, key=OTHER_KEY)), "was not made with a key"),
        ((signed((3, 100, 200), writes=True, tenant="other"),), "another tenant"),
        ((signed((3, 100, 200), writes=True, expires_s=clock.now_s),), "expired"),
    ):
        with pytest.raises(AccessDenied, match=why):
            gate.check(write(*grants), [1])
    with pytest.raises(AccessDenied, match="is to write"):
        gate.check(read(good), [1])


# ---- on a lane


@pytest.fixture
def server() -> Iterator[Any]:
    server = new_server()
    server.set_keys(KEY)
    yield server
    server.stop()


@pytest.fixture
def file(tmp_path: Path, server: Any) -> Iterator[File]:
    file = File(tmp_path / "blocks", os.urandom(CHUNK_BYTES))
    file.put(server, chunk=chunk_id(7, 0))
    yield file
    os.close(file.fd)


class Readers:
    """Makes lanes of one tenant, as `LaneProbe` wants a server to."""

    def __init__(self, server: Any, tenant: str) -> None:
        self._server, self._tenant = server, tenant

    def adopt(self, descriptor: int, is_stream: bool) -> None:
        self._server.adopt(descriptor, is_stream, self._tenant)


def lane_of(server: Any, tenant: str = "acme") -> LaneProbe:
    return LaneProbe(Readers(server, tenant))


def show(lane: LaneProbe, grant: bytes, place: int = 1) -> None:
    """With a read, whatever comes of it."""
    item = lane.item(chunk_id(7, 0), 0, 1)[:-4] + place.to_bytes(4, "little")
    lane.call += 1
    lane.kind = READ
    lane.socket.send(HEAD.pack(MAGIC, READ, 1, lane.call) + item + grant)
    lane.receive()


def read_lane(lane: LaneProbe, begin: int, length: int, *, place: int = 1, index: int = 0) -> bytes | None:
    """None: declined."""
    lane.memory[:] = b"\xee" * len(lane.memory)
    plain = lane.item(chunk_id(7, index), begin, length)
    lane.send(plain[:-4] + place.to_bytes(4, "little"))
    (count,) = lane.receive()
    assert bytes(lane.memory[length:]) == b"\xee" * (len(lane.memory) - length), "nothing but what was asked for"
    if count < 0:
        assert bytes(lane.memory[:length]) == b"\xee" * length, "what is refused is not even written"
        return None
    return bytes(lane.memory[:length])


@needs_native
def test_a_lane_serves_what_a_grant_covers(server: Any, file: File) -> None:
    lane = lane_of(server)
    assert read_lane(lane, 5000, 10_000) is None
    show(lane, signed((3, 5000, 15_000)))
    assert read_lane(lane, 5000, 10_000) == file.content[5000:15_000]
    assert read_lane(lane, 5001, 9000) == file.content[5001:14_001]
    for begin, length in ((5000, 10_001), (4999, 10), (14_999, 2), (0, 1)):
        assert read_lane(lane, begin, length) is None, (begin, length)
    for place in (0, 2, 64, 65, 1 << 31):
        assert read_lane(lane, 5000, 10, place=place) is None
    assert read_lane(lane, 5000, 10, index=1 << 60) is None, "no place in the file overflows"
    lane.close()


@needs_native
def test_a_lane_of_a_full_client_needs_no_grant(server: Any, file: File) -> None:
    lane = LaneProbe(server)
    show(lane, b"junk")
    assert read_lane(lane, 5000, 100, place=0) == file.content[5000:5100]
    lane.close()


@needs_native
def test_what_one_lane_was_shown_is_of_no_use_to_another(server: Any, file: File) -> None:
    lane, other, anybody = lane_of(server), lane_of(server, "other"), lane_of(server, "")
    grant = signed((3, 0, 100))
    show(lane, grant)
    assert read_lane(lane, 0, 100) is not None
    assert read_lane(other, 0, 100) is None
    show(other, grant)
    assert read_lane(other, 0, 100) is None, "it is another tenant's"
    show(anybody, grant)
    assert read_lane(anybody, 0, 100) is not None
    for each in (lane, other, anybody):
        each.close()


@needs_native
def test_a_lane_notices_what_python_notices(server: Any, file: File) -> None:
    lane, grant = lane_of(server), signed((3, 0, 100))
    for at in range(len(grant)):
        show(lane, grant[:at] + bytes([grant[at] ^ 1]) + grant[at + 1 :])
        assert read_lane(lane, 0, 100) is None, at
    for bad in (b"", grant[:-1], grant + b"x", signed((3, 0, 100), expires_s=1), signed((3, 0, 100), key=OTHER_KEY)):
        show(lane, bad)
        assert read_lane(lane, 0, 100) is None
    show(lane, grant)
    assert read_lane(lane, 0, 100) is not None
    server.set_keys(OTHER_KEY + KEY)
    show(lane, signed((3, 0, 100), key=OTHER_KEY), place=2)
    assert read_lane(lane, 0, 100, place=2) is not None
    server.set_keys(OTHER_KEY)
    assert read_lane(lane, 0, 100) is None, "nor what was shown before"
    assert read_lane(lane, 0, 100, place=2) is None, "until it is shown again"
    show(lane, signed((3, 0, 100), key=OTHER_KEY), place=2)
    assert read_lane(lane, 0, 100, place=2) is not None
    show(lane, grant)
    assert read_lane(lane, 0, 100) is None
    lane.close()


@needs_native
def test_a_place_that_there_is_not_ends_the_lane(server: Any) -> None:
    for place in (0, 65):
        lane = lane_of(server)
        with pytest.raises(ConnectionError):
            show(lane, signed((3, 0, 100)), place)
        lane.close()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A server that knows a chunk, for many examples."""
    server = new_server()
    server.set_keys(KEY)
    file = File(tmp_path_factory.mktemp("lanes") / "blocks", os.urandom(1000))
    file.put(server, chunk=chunk_id(7, 0))
    yield server
    server.stop()
    os.close(file.fd)


@needs_native
@settings(max_examples=60, deadline=None)
@given(
    ranges=st.lists(
        st.tuples(st.sampled_from([3, 4]), st.integers(0, 300), st.integers(1, 90)), min_size=1, max_size=120
    ),
    reads=st.lists(st.tuples(st.integers(0, 420), st.integers(1, 120)), min_size=1, max_size=30),
    tenant=st.text(max_size=70),
)
def test_lanes_and_python_agree(
    shared: Any, ranges: list[tuple[int, int, int]], reads: list[tuple[int, int]], tenant: str
) -> None:
    """Whatever the length of what is signed, and wherever its ranges lie."""
    named = [(number, begin, begin + length) for number, begin, length in ranges]
    tenant = tenant.replace("\0", "")
    data = signed(*named, tenant=tenant)
    lane = lane_of(shared, tenant)
    show(lane, data)
    for begin, length in reads:
        allowed = all(any(n == 3 and b <= at < e for n, b, e in named) for at in range(begin, begin + length))
        assert covers(data, 7, begin, length) == allowed
        assert (read_lane(lane, begin, length) is not None) == allowed
    lane.close()


# ---- who may send what


def test_readers_may_send_three_requests() -> None:
    """One that is added is closed to them, until somebody says here why it is not."""
    assert {kind.__name__ for kind in message_classes() if READER in kind.may_send} == {
        "Foreign",  # A KV-cache service asks for a token of its own.
        "GetRouting",
        "ReadChunks",  # `Gate` looks at each.
    }


def test_writers_may_send_four_more() -> None:
    """The same: what else they send is a client's."""
    writers = {kind.__name__ for kind in message_classes() if WRITER in kind.may_send}
    assert writers - {kind.__name__ for kind in message_classes() if READER in kind.may_send} == {
        "CloseClient",
        "ExtendSession",
        "OpenSession",  # Storage servers know by it whether they have seen a write before.
        "WriteChunks",  # `Gate` looks at each.
    }
