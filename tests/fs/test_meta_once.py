"""A request that changes something is done once, however often it comes and to whichever metadata server."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from emberfs.errors import (
    AlreadyExists,
    EmberError,
    NotFound,
    ProtocolError,
    Unavailable,
    UpdateUnknown,
)
from emberfs.messages import (
    CloseSession,
    CommitPut,
    DropTail,
    Link,
    Message,
    Mkdir,
    Remove,
    Rename,
    ReportLength,
    Stat,
    TrashEmpty,
    TrashList,
    Truncate,
)
from emberfs.meta.clients import PRUNE_EVERY
from emberfs.meta.keys import rows_of
from emberfs.types import Inode
from msgspec.structs import replace

from tests.fs.meta_cluster import Client, Cluster, open_file, simulate
from tests.fs.meta_fakes import CHUNK


async def _prepare(client: Client) -> tuple[Inode, bytes]:
    """/dir/file in chunks, open; /dir/other; an entry of the trash."""
    await client(0, Mkdir("/dir", 0o755, False, False))
    file = await client.put(0, "/dir/file", 3 * CHUNK)
    await client.put(0, "/dir/other", CHUNK)
    await client.put(0, "/trashed", CHUNK)
    await client(0, Remove("/trashed", False, True, "any"))
    opened = await client(0, open_file("/dir/file"))
    return file, opened.session


REQUESTS: list[Callable[[int, bytes], Message]] = [
    lambda inode, session: Mkdir("/new", 0o755, False, False),
    lambda inode, session: Link("/dir/file", "/linked"),
    lambda inode, session: Rename("/dir/file", "/moved", False),
    lambda inode, session: Remove("/dir/file", False, False, "any"),
    lambda inode, session: Remove("/dir/file", False, True, "any"),
    lambda inode, session: Remove("/dir", True, False, "any"),
    lambda inode, session: open_file("/dir/file", truncate=True),
    lambda inode, session: open_file("/dir/new", append=True),
    lambda inode, session: Truncate("", inode, CHUNK),
    lambda inode, session: DropTail(session, inode),
    lambda inode, session: CloseSession(session, inode, 9 * CHUNK, 0),
    lambda inode, session: CommitPut("/inline", 0, None, b"x", 1, 0o644, False),
    lambda inode, session: TrashEmpty(0.0),
]


@pytest.mark.parametrize("number", range(len(REQUESTS)))
def test_a_request_that_comes_twice_is_done_once(number: int) -> None:
    async def main(cluster: Cluster) -> None:
        client = await cluster.client()
        file, session = await _prepare(client)
        once = client.once(REQUESTS[number](file.id, session))
        first, second = await cluster.both(*(server.handle(once) for server in cluster.servers))
        assert not isinstance(first, EmberError)
        assert second == first or isinstance(second, UpdateUnknown)
        before = cluster.kv.snapshot()
        assert await cluster.servers[0].handle(once) == first
        after = cluster.kv.snapshot()
        assert {key: row for key, row in before.items() if key[:1] != b"W"} == {
            key: row for key, row in after.items() if key[:1] != b"W"
        }

    for seed in range(5):
        simulate(main, seed)


def test_a_late_copy_of_a_truncate_cuts_nothing() -> None:
    async def main(cluster: Cluster) -> None:
        client = await cluster.client()
        file, session = await _prepare(client)
        once = client.once(Truncate("", file.id, 0))
        truncated = (await cluster.servers[0].handle(once)).inode  # type: ignore[attr-defined]
        cluster.chunks.write(file.id, 2 * CHUNK)
        await client(0, ReportLength(session, file.id, 2 * CHUNK, truncated.truncate_generation, True))
        await cluster.servers[1].handle(once)
        assert (await client.stat(1, "/dir/file")).length == 2 * CHUNK
        assert len(cluster.chunks.of(file.id)) == 2

    simulate(main)


def test_a_late_copy_of_emptying_the_trash_removes_nothing_newer() -> None:
    async def main(cluster: Cluster) -> None:
        client = await cluster.client()
        await _prepare(client)
        once = client.once(TrashEmpty(0.0))
        await cluster.servers[0].handle(once)
        await client(0, Remove("/dir", True, True, "any"))
        with pytest.raises(UpdateUnknown):
            await cluster.servers[1].handle(once)
        assert [entry.path for entry in (await client(0, TrashList())).entries] == ["/dir"]

    simulate(main)


def test_a_refusal_that_was_answered_stays_one() -> None:
    """Another attempt, or a copy, is still on its way while one is refused; then the way would be free."""

    async def main(cluster: Cluster) -> None:
        client = await cluster.client()
        await client(0, Mkdir("/dir", 0o755, False, False))
        once = client.once(Mkdir("/dir", 0o755, False, False))
        with pytest.raises(AlreadyExists):
            await cluster.servers[0].handle(once)
        await client(0, Remove("/dir", False, False, "any"))
        with pytest.raises(AlreadyExists):
            await cluster.servers[1].handle(once)
        with pytest.raises(NotFound):
            await client.stat(0, "/dir")

    simulate(main)


def test_answers_are_forgotten_when_the_client_has_them() -> None:
    async def main(cluster: Cluster) -> None:
        client = await cluster.client()
        first = client.once(Mkdir("/dir", 0o755, False, False))
        await cluster.servers[0].handle(first)
        for number in range(PRUNE_EVERY):
            await client(number % 2, Mkdir("/dir", 0o755, False, True))
        assert len(await cluster.kv.begin().range(*rows_of(b"O"))) < 5
        await client(0, Remove("/dir", False, False, "any"))
        with pytest.raises(UpdateUnknown):
            await cluster.servers[1].handle(first)

    simulate(main)


def test_what_changes_something_must_come_as_once() -> None:
    async def main(cluster: Cluster) -> None:
        client = await cluster.client()
        server = cluster.servers[0]
        for request in (
            Mkdir("/dir", 0o755, False, False),
            client.once(Stat("/")),
            client.once(client.once(Stat("/"))),
        ):
            with pytest.raises(ProtocolError):
                await server.handle(request)

    simulate(main)


def test_a_copy_of_a_refused_attempt_does_not_happen_after_all() -> None:
    """The client was told that nothing happened, and has given up; another attempt of its is another matter."""

    async def main(cluster: Cluster) -> None:
        client = await cluster.client()
        await client(0, Mkdir("/dir", 0o755, False, False))
        first = replace(client.once(Mkdir("/dir/a", 0o755, False, False)), attempt=1)
        cluster.kv.is_away = True
        with pytest.raises(Unavailable):
            await cluster.servers[0].handle(first)
        cluster.kv.is_away = False
        with pytest.raises(UpdateUnknown, match="copy"):
            await cluster.servers[0].handle(first)
        with pytest.raises(NotFound):
            await client.stat(0, "/dir/a")
        await cluster.servers[0].handle(replace(first, attempt=2))
        await client.stat(0, "/dir/a")
        later = replace(client.once(Mkdir("/dir/b", 0o755, False, False)), attempt=1)
        await cluster.servers[0].handle(later)
        with pytest.raises(UpdateUnknown, match="copy"):
            await cluster.servers[0].handle(replace(first, attempt=3))

    simulate(main)
