"""Chains that change: deaths, restarts with leftovers, settling, and resync."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from unittest.mock import patch

import pytest
from emberfs.engine import Action, InstallItem, Prepared, Update
from emberfs.errors import Corruption, NoSpace, StaleRouting, Unavailable, UpdateUnknown
from emberfs.messages import Forward, ListChunks, Message, Vouch
from emberfs.routing import LocalState
from emberfs.types import chunk_id

from tests.fs.chain_fakes import CHUNK, OFFLINE, OTHER, SERVING, SYNCING, ReplicaChain, on_chain

SEEDS = range(12)


@pytest.mark.parametrize("dead", ["b", "c"])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_write_survives_the_death_of_a_later_replica(dead: str, seed: int) -> None:
    async def work(chain: ReplicaChain) -> None:
        await chain.write("a", b"old")
        await chain[dead].stop()
        writing = chain.runtime.spawn(chain.write("a", b"new"), "write")
        await chain.runtime.sleep(0.5)
        alive = [name for name in "abc" if name != dead]
        chain.change({**dict.fromkeys(alive, SERVING), dead: OFFLINE})
        await writing
        assert [await chain.read(name) for name in alive] == [b"new"] * 2

    on_chain(work, seed=seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_retry_after_the_death_of_the_head_is_applied_once(seed: int) -> None:
    async def work(chain: ReplicaChain) -> None:
        await chain.write("a", b"____")
        update = chain.update(Action.WRITE, b"x")
        writing = chain.runtime.spawn(chain.send("a", update), "write")
        await chain.until(lambda: _has_version(chain, "b", 2))
        chain.wire.services.pop("a")
        chain["a"].replica.follow(
            chain.change({"b": SERVING, "c": SERVING, "a": OFFLINE}, tell="bc"), _addresses(chain)
        )
        with suppress(UpdateUnknown):
            await writing
        await chain.send("b", update)
        assert [await chain.read(name) for name in "bc"] == [b"x___"] * 2
        (state,) = await chain["c"].engine.states([CHUNK])
        assert state is not None and state.version == 2

    on_chain(work, seed=seed)


def _addresses(chain: ReplicaChain) -> dict[bytes, str]:
    return {member.target: member.name for member in chain.members.values()}


async def _has_version(chain: ReplicaChain, name: str, version: int) -> bool:
    (state,) = await chain[name].engine.states([CHUNK])
    return state is not None and version in (state.version, state.pending_version)


async def _is_settled(chain: ReplicaChain, names: str) -> bool:
    return await chain.equal(names)


def _leftover(payload: bytes, version: int = 1, chunk: bytes = CHUNK) -> Update:
    return Update(chunk, Action.REPLACE, 0, memoryview(payload), version, 1)


def test_what_the_head_has_pending_is_committed_after_a_change() -> None:
    async def work(chain: ReplicaChain) -> None:
        for name in "ab":  # The tail that is gone may have committed it, and shown it to a reader.
            await chain[name].engine.prepare([_leftover(b"seen")], checks_requests=False)
        await chain["c"].stop()
        chain.change({"a": SERVING, "b": SERVING, "c": OFFLINE})
        assert await chain.read("b") == b"seen"
        assert await chain.read("a") == b"seen"
        await chain.until(lambda: _is_settled(chain, "ab"))

    on_chain(work)


def test_what_the_head_lost_is_committed_by_nobody() -> None:
    """The power failed before the head's own prepare was durable: the tail must not commit it all the same."""

    async def work(chain: ReplicaChain) -> None:
        await chain.write("a", b"old")
        for name in "bc":
            await chain[name].engine.prepare([_leftover(b"orphan", 2)], checks_requests=False)
        chain.change({"a": SERVING, "b": SERVING, "c": SERVING})
        assert [await chain.read(name) for name in "cba"] == [b"old"] * 3
        await chain.until(lambda: _is_settled(chain, "abc"))
        await chain.write("a", b"new")
        assert [await chain.read(name) for name in "abc"] == [b"new"] * 3

    on_chain(work)


def test_a_new_tail_answers_only_once_the_head_has_settled() -> None:
    async def work(chain: ReplicaChain) -> None:
        for name in "ab":
            await chain[name].engine.prepare([_leftover(b"seen")], checks_requests=False)
        chain.change({"a": SERVING, "b": SERVING, "c": OFFLINE}, tell="b")
        reading = chain.runtime.spawn(chain.read("b"), "read")
        await chain.runtime.sleep(4.0)
        assert not reading.done()
        chain.tell("a")
        assert await reading == b"seen"

    on_chain(work)


def test_a_tail_that_nobody_settles_says_so_in_the_end() -> None:
    async def work(chain: ReplicaChain) -> None:
        for name in "ab":
            await chain[name].engine.prepare([_leftover(b"seen")], checks_requests=False)
        chain.change({"a": SERVING, "b": SERVING, "c": OFFLINE}, tell="b")
        for asking in (chain.read("b"), _listed(chain, "b")):
            with pytest.raises(Unavailable, match="settled"):
                await asking

    on_chain(work)


async def _listed(chain: ReplicaChain, tail: str) -> list[bytes]:
    everything = ListChunks(1, chunk_id(0, 0), chunk_id(100, 0), chain_version=chain.version)
    return [chunk for chunk, _ in (await chain[tail].replica.list(everything)).chunks]


def test_a_full_successor_keeps_only_the_chunks_that_it_cannot_take() -> None:
    """Its disk could never be emptied if nothing could be listed and removed."""

    async def work(chain: ReplicaChain) -> None:
        await chain.write("a", b"old")
        await chain.write("a", b"old", chunk=OTHER)
        for name in "ac":
            await chain[name].engine.prepare([_leftover(b"new", 2)], checks_requests=False)
        with patch.object(chain["b"].engine.allocator, "allocate", side_effect=NoSpace("the disk is full")):
            chain.change(dict.fromkeys("abc", SERVING))
            assert await chain.read("c", chunk=OTHER) == b"old"
            await chain.until(lambda: _has_settled(chain, "c"))
            assert await chain["c"].is_pending(), "an old tail may have committed it"
            with pytest.raises(Unavailable, match="settle"):
                await chain.read("c")
            with pytest.raises(Unavailable, match="settle"):
                await _listed(chain, "c")
            await chain["c"].replica.list(ListChunks(1, OTHER, chunk_id(100, 0), chain_version=chain.version))
            await chain.send("a", chain.update(Action.REMOVE, chunk=OTHER))
            with pytest.raises(NoSpace):
                await chain.write("a", b"newer")
        await chain.until(lambda: _is_settled(chain, "abc"))
        assert [await chain.read(name) for name in "abc"] == [b"new"] * 3
        assert await _listed(chain, "c") == [CHUNK]

    on_chain(work)


async def _has_settled(chain: ReplicaChain, name: str) -> bool:
    view = chain[name].replica.view
    return view is not None and view.settled.done()


def test_damaged_bytes_at_the_head_keep_only_their_chunk() -> None:
    async def work(chain: ReplicaChain) -> None:
        await chain.write("a", b"old", chunk=OTHER)
        for name in "ab":
            await chain[name].engine.prepare([_leftover(b"bytes" * 4000)], checks_requests=False)
        content = chain["a"].engine.content

        async def damaged(chunk: bytes, **options: bool) -> object:
            if chunk == CHUNK:
                raise Corruption("the bytes are damaged")
            return await content(chunk, **options)

        with patch.object(chain["a"].engine, "content", damaged):
            chain.change({"a": SERVING, "b": SERVING, "c": SYNCING})
            assert await chain.read("b", chunk=OTHER) == b"old"
            with pytest.raises(Unavailable, match="settle"):
                await chain.read("b")
            await chain.write("a", b"new", chunk=OTHER)
        await chain.until(lambda: _is_synced(chain, "c"))
        assert await chain.equal("abc")

    on_chain(work)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_vouch_of_an_older_chain_version_commits_nothing(seed: int) -> None:
    async def work(chain: ReplicaChain) -> None:
        async def hold(address: str, request: Message) -> None:
            if isinstance(request, Vouch):
                await chain.runtime.sleep(1e3)

        chain.wire.before = hold
        writing = chain.runtime.spawn(chain.write("a", b"new"), "write")
        await chain.until(lambda: chain["c"].is_pending())
        chain.wire.services.pop("a")
        chain.change({"b": SERVING, "c": SERVING, "a": OFFLINE}, tell="c")
        with pytest.raises(StaleRouting):
            await chain["c"].replica.handle(Vouch(1, 1, 1), [])
        assert await chain["c"].committed() is None
        chain.tell("b")
        chain["a"].replica.follow(chain.chain, _addresses(chain))
        with pytest.raises(UpdateUnknown):
            await writing
        await chain.until(lambda: _is_settled(chain, "bc"))

    on_chain(work, seed=seed)


def test_a_late_copy_of_a_forward_is_refused() -> None:
    async def work(chain: ReplicaChain) -> None:
        caught: list[Forward] = []

        async def note(address: str, request: Message) -> None:
            if isinstance(request, Forward) and address == "b":
                caught.append(request)

        chain.wire.before = note
        await chain.write("a", b"one")
        await chain.write("a", b"two")
        for forward in caught:
            with pytest.raises(UpdateUnknown, match="late copy"):
                await chain["b"].replica.handle(forward, [memoryview(b"one")])
        assert [await chain.read(name) for name in "abc"] == [b"two"] * 3

    on_chain(work)


# ---- resync


async def _is_synced(chain: ReplicaChain, name: str) -> bool:
    return chain[name].replica.local_state() == (LocalState.UP_TO_DATE, chain.version)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_replica_that_was_away_gets_what_it_missed(seed: int) -> None:
    async def work(chain: ReplicaChain) -> None:
        chunks = [chunk_id(9, number) for number in range(8)]
        for chunk in chunks:
            await chain.write("a", b"old" + chunk, chunk=chunk)
        chain.change({"a": SERVING, "b": SERVING, "c": OFFLINE})
        await chain.write("a", b"diverged", chunk=chunks[0])
        await chain.send("a", chain.update(Action.REMOVE, chunk=chunks[1]))
        await chain.write("a", b"missing", chunk=chunk_id(9, 100))
        engine = chain["c"].engine
        extra = chunk_id(8, 1)
        await engine.install([InstallItem(extra, 5, 1, memoryview(b"extra"))])
        await engine.install([InstallItem(chunks[2], 9, 1, memoryview(b"newer, and wrong"))])
        await engine.prepare([_leftover(b"orphan", 2, chunks[3])], checks_requests=False)
        txn = chain["c"].index.begin()
        txn.put(b"c" + chunks[4], b"damaged")
        await txn.commit()
        chain.change({"a": SERVING, "b": SERVING, "c": SYNCING})
        await chain.write("a", b"meanwhile", chunk=chunks[5])
        with pytest.raises(StaleRouting):
            await chain.read("c")
        await chain.until(lambda: _is_synced(chain, "c"))
        assert await chain.equal("abc")
        assert await engine.request_rows() == await chain["a"].engine.request_rows()
        chain.change({"a": SERVING, "b": SERVING, "c": SERVING})
        assert await chain.read("c", chunk=chunks[0]) == b"diverged" + (b"old" + chunks[0])[8:]
        assert await chain.read("c", chunk=chunks[5]) == b"meanwhile" + (b"old" + chunks[5])[9:]
        assert await chain.read("c", chunk=extra) == b""

    on_chain(work, seed=seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_writes_during_a_resync_reach_the_syncing_replica_before_they_are_seen(seed: int) -> None:
    async def work(chain: ReplicaChain) -> None:
        chain.change({"a": SERVING, "b": SERVING, "c": OFFLINE})
        await chain.write("a", b"base" * 5000)
        held = chain.runtime.future()

        async def hold(address: str, request: Message) -> None:
            if isinstance(request, Forward) and address == "c":
                await held

        chain.wire.before = hold
        chain.change({"a": SERVING, "b": SERVING, "c": SYNCING})
        writing = chain.runtime.spawn(chain.write("a", b"BASE"), "write")
        await chain.until(lambda: chain["b"].is_pending())
        await chain.runtime.sleep(0.5)
        assert (await chain.read("b"))[:4] == b"base", "c may be the tail the next moment, and does not have it yet"
        held.set_result(None)
        await writing
        await chain.until(lambda: _is_synced(chain, "c"))
        chain.change({"a": SERVING, "b": SERVING, "c": SERVING})
        assert [(await chain.read(name))[:8] for name in "abc"] == [b"BASEbase"] * 3

    on_chain(work, seed=seed)


def test_one_replica_alone_takes_writes_while_another_syncs() -> None:
    async def work(chain: ReplicaChain) -> None:
        chain.change({"a": SERVING, "b": OFFLINE})
        for number in range(20):
            await chain.write("a", bytes([number]) * 100, chunk=chunk_id(9, number))
        chain.change({"a": SERVING, "b": SYNCING})
        for number in range(0, 20, 3):
            await chain.write("a", b"new", chunk=chunk_id(9, number))
        await chain.until(lambda: _is_synced(chain, "b"))
        assert await chain.equal("ab")

    on_chain(work, names="ab")


def test_a_write_that_began_alone_reaches_a_replica_that_syncs_before_it_ends() -> None:
    async def work(chain: ReplicaChain) -> None:
        await chain.write("a", b"old")
        await chain["b"].stop()
        chain.change({"a": SERVING, "b": OFFLINE})
        await chain["b"].start()
        prepare = chain["a"].engine.prepare

        async def slow(updates: Sequence[Update], **options: bool) -> list[Prepared]:
            await chain.runtime.sleep(1)
            return await prepare(updates, **options)

        with patch.object(chain["a"].engine, "prepare", slow):
            writing = chain.runtime.spawn(chain.write("a", b"new"), "write")
            await chain.runtime.sleep(0.1)
            chain.change({"a": SERVING, "b": SYNCING})
            await chain.until(lambda: _has_synced(chain, "b"))
            await writing
        chain.change({"a": SERVING, "b": SERVING})
        assert [await chain.read(name) for name in "ab"] == [b"new"] * 2

    on_chain(work, names="ab")


async def _has_synced(chain: ReplicaChain, name: str) -> bool:
    return chain[name].replica.local_state()[0] is LocalState.UP_TO_DATE


def test_a_removed_chunk_does_not_come_back_with_an_old_replica() -> None:
    async def work(chain: ReplicaChain) -> None:
        await chain.write("a", b"once")
        chain.change({"a": SERVING, "b": SERVING, "c": OFFLINE})
        await chain.send("a", chain.update(Action.REMOVE))
        for name in "ab":
            await chain[name].engine.purge([CHUNK])
        chain.change({"a": SERVING, "b": SERVING, "c": SYNCING})
        await chain.until(lambda: _is_synced(chain, "c"))
        assert await chain["c"].engine.states([CHUNK]) == [None]
        assert chain["c"].engine.floor == 2
        chain.change({"c": SERVING, "a": OFFLINE, "b": OFFLINE})
        await chain.write("c", b"again")
        (state,) = await chain["c"].engine.states([CHUNK])
        assert state is not None and state.version == 3

    on_chain(work)


@pytest.mark.parametrize("seed", SEEDS)
def test_leftovers_of_a_restart_are_settled(seed: int) -> None:
    async def work(chain: ReplicaChain) -> None:
        await chain.write("a", b"old")

        async def lose(address: str, request: Message) -> None:
            if address == "b":
                raise Unavailable("cut off")

        chain.wire.before = lose
        writing = chain.runtime.spawn(chain.write("a", b"new"), "write")
        await chain.until(lambda: chain["a"].is_pending())
        await chain["a"].stop()
        with pytest.raises(Exception, match=r"committed|lost|head"):
            await writing
        chain.wire.before = None
        await chain["a"].start()
        chain.change({"a": SERVING, "b": SERVING, "c": SERVING})
        assert await chain.read("c") in (b"old", b"new")
        await chain.until(lambda: _is_settled(chain, "abc"))
        assert [await chain.read(name) for name in "abc"] == [b"new"] * 3

    on_chain(work, seed=seed)


def test_another_disk_content_than_the_chain_trusts_serves_nothing() -> None:
    async def work(chain: ReplicaChain) -> None:
        await chain.write("a", b"x", chunk=OTHER)
        await chain["c"].stop()
        chain["c"].rows = {}
        await chain["c"].start()
        generation_known = chain.chain
        chain["c"].replica.follow(generation_known, _addresses(chain))
        assert chain["c"].replica.local_state() == (LocalState.FRESH, 0)
        with pytest.raises(StaleRouting, match="content"):
            await chain.read("c", chunk=OTHER)

    on_chain(work)
