"""Writes and reads of a chain: the commit point, dirty reads, fencing, and what a retry does."""

from __future__ import annotations

import pytest
from emberfs.engine import Action, Update
from emberfs.errors import Corruption, NoSpace, StaleChunk, StaleRouting, Unavailable, UpdateUnknown
from emberfs.messages import Forward, ListChunks, Message, Vouch

from tests.fs.chain_fakes import CHUNK, OFFLINE, OTHER, SERVING, ReplicaChain, on_chain

SEEDS = range(12)


@pytest.mark.parametrize("seed", SEEDS)
def test_what_was_written_is_committed_everywhere_and_read_anywhere(seed: int) -> None:
    async def work(chain: ReplicaChain) -> None:
        await chain.write("a", b"one")
        await chain.write("a", b"TWO", offset=3)
        for name in "abc":
            assert await chain.read(name) == b"oneTWO"
        await chain.send("a", chain.update(Action.TRUNCATE, offset=4))
        assert [await chain.read(name) for name in "abc"] == [b"oneT"] * 3
        await chain.send("a", chain.update(Action.REMOVE))
        assert [await chain.read(name) for name in "abc"] == [b""] * 3
        assert await chain.equal("abc")

    on_chain(work, seed=seed)


def test_updates_of_one_chunk_in_a_batch_are_applied_in_order() -> None:
    async def work(chain: ReplicaChain) -> None:
        await chain.send(
            "a",
            chain.update(Action.WRITE, b"xx"),
            chain.update(Action.WRITE, b"other", chunk=OTHER),
            chain.update(Action.WRITE, b"y", offset=1),
        )
        assert (await chain.read("c"), await chain.read("b", chunk=OTHER)) == (b"xy", b"other")

    on_chain(work)


def test_every_replica_gives_a_chunk_the_room_that_was_asked_for() -> None:
    async def work(chain: ReplicaChain) -> None:
        grows = chain.update(Action.WRITE, b"x" * 4096)._replace(room_bytes=1 << 19)
        await chain.send("a", grows, chain.update(Action.WRITE, b"short", chunk=OTHER))
        assert [chain[name].engine.space()[0] for name in "abc"] == [(1 << 19) + (64 << 10)] * 3
        await chain.write("a", b"y" * 100_000, offset=4096)
        assert [chain[name].engine.space()[0] for name in "abc"] == [(1 << 19) + (64 << 10)] * 3
        assert await chain.equal("abc")

    on_chain(work)


def test_the_tail_commits_only_what_all_before_it_hold_durably() -> None:
    async def work(chain: ReplicaChain) -> None:
        held = chain.runtime.future()

        async def hold_vouches(address: str, request: Message) -> None:
            if isinstance(request, Vouch) and address == "c":
                await held

        chain.wire.before = hold_vouches
        writing = chain.runtime.spawn(chain.write("a", b"new"), "write")
        await chain.until(lambda: chain["c"].is_pending())
        await chain.runtime.sleep(1.0)
        assert await chain["c"].committed() is None
        assert [await chain.read(name) for name in "abc"] == [b""] * 3, "not committed is not read"
        held.set_result(None)
        await writing
        assert await chain["c"].committed() == b"new"

    on_chain(work)


def test_a_dirty_read_is_resolved_at_the_tail() -> None:
    async def work(chain: ReplicaChain) -> None:
        await chain.write("a", b"old")
        held = chain.runtime.future()

        async def hold_answers(address: str, request: Message) -> None:
            if isinstance(request, Forward) and address == "c":
                await held

        chain.wire.after = hold_answers
        writing = chain.runtime.spawn(chain.write("a", b"new"), "write")
        await chain.until(lambda: _is(chain, "c", b"new"))
        assert await chain["a"].committed() == b"old"
        assert [await chain.read(name) for name in "abc"] == [b"new"] * 3
        assert await chain.read("a", local=False) == b"old"
        held.set_result(None)
        await writing

    on_chain(work)


def test_what_is_not_committed_is_read_by_who_asks_for_it() -> None:
    async def work(chain: ReplicaChain) -> None:
        await chain.write("a", b"old")
        held = chain.runtime.future()

        async def hold(address: str, request: Message) -> None:
            if isinstance(request, Forward) and address == "c":
                await held

        chain.wire.before = hold
        writing = chain.runtime.spawn(chain.write("a", b"new"), "write")
        await chain.runtime.sleep(0.1)
        assert [await chain.read(name, local=True) for name in "abc"] == [b"new", b"new", b"old"]
        assert [await chain.read(name) for name in "abc"] == [b"old"] * 3
        held.set_result(None)
        await writing
        assert [await chain.read(name, local=True) for name in "abc"] == [b"new"] * 3

    on_chain(work)


async def _is(chain: ReplicaChain, name: str, content: bytes) -> bool:
    return await chain[name].committed() == content


def test_another_chain_version_is_refused_before_and_after_the_lock() -> None:
    async def work(chain: ReplicaChain) -> None:
        with pytest.raises(StaleRouting):
            await chain["a"].replica.update(99, [chain.update(Action.WRITE, b"x")])
        with pytest.raises(StaleRouting):
            await chain["b"].replica.update(chain.version, [chain.update(Action.WRITE, b"x")])
        await chain["a"].replica.locks.acquire([CHUNK])
        waiting = chain.runtime.spawn(chain.write("a", b"x"), "write")
        await chain.runtime.sleep(0.1)
        chain.change({"b": SERVING, "c": SERVING, "a": OFFLINE})
        chain["a"].replica.locks.release([CHUNK])
        with pytest.raises(StaleRouting):
            await waiting
        assert await chain["a"].engine.states([CHUNK]) == [None]

    on_chain(work)


def test_outside_its_lease_nobody_serves() -> None:
    async def work(chain: ReplicaChain) -> None:
        await chain.write("a", b"x")
        lease = chain["b"].lease = chain["b"].replica._lease = type(chain["b"].lease)(chain.runtime)
        lease.renew(chain.runtime.now_s(), 2.5)
        assert await chain.read("b") == b"x"
        await chain.runtime.sleep(2.5)
        with pytest.raises(StaleRouting, match="manager"):
            await chain.read("b")

    on_chain(work)


def test_a_retry_is_not_applied_twice_and_a_late_copy_is_refused() -> None:
    async def work(chain: ReplicaChain) -> None:
        first = chain.update(Action.WRITE, b"first")
        await chain.send("a", first)
        await chain.send("a", first)
        (state,) = await chain["c"].engine.states([CHUNK])
        assert state is not None and state.version == 1
        await chain.write("a", b"later")
        with pytest.raises(StaleChunk, match="late copy"):
            await chain.send("a", first)
        assert await chain.read("b") == b"later"

    on_chain(work)


def test_a_removal_of_nothing_counts_too() -> None:
    async def work(chain: ReplicaChain) -> None:
        removal = chain.update(Action.REMOVE)
        cut = chain.update(Action.TRUNCATE, offset=0)._replace(chunk=OTHER)
        await chain.send("a", removal)
        await chain.send("a", cut._replace(request=cut.request._replace(channel=2)))
        await chain.send("a", chain.update(Action.WRITE, b"x")._replace(request=cut.request._replace(channel=3)))
        await chain.send("a", removal)
        assert await chain.read("c") == b"x", "a late copy of the removal must not remove what came after it"

    on_chain(work)


def removals(chain: ReplicaChain, *chunks: bytes, action: Action = Action.REMOVE) -> list[Update]:
    updates = [chain.update(action, chunk=chunk) for chunk in chunks]
    return [each._replace(request=each.request._replace(channel=7 + slot)) for slot, each in enumerate(updates)]


@pytest.mark.parametrize("action", [Action.REMOVE, Action.TRUNCATE])
def test_a_chunk_that_changed_since_it_was_looked_at_stays(action: Action) -> None:
    async def work(chain: ReplicaChain) -> None:
        await chain.write("a", b"old")
        await chain.write("a", b"other", chunk=OTHER)
        listed = await chain["c"].replica.list(ListChunks(1, CHUNK, OTHER + b"\0", chain_version=chain.version))
        assert (listed.chunks, listed.versions) == ([(CHUNK, 3), (OTHER, 5)], [1, 1])
        await chain.write("a", b"new")
        late = removals(chain, CHUNK, OTHER, action=action)
        expected = dict(zip((CHUNK, OTHER), listed.versions, strict=True))
        for _ in range(2):
            with pytest.raises(StaleChunk, match="1 of 2"):
                await chain["a"].replica.update(chain.version, late, expected=expected)
            assert [await chain.read(name) for name in "abc"] == [b"new"] * 3
            assert [await chain.read(name, chunk=OTHER) for name in "abc"] == [b""] * 3
        (again,) = removals(chain, CHUNK, action=action)
        await chain["a"].replica.update(chain.version, [again], expected={CHUNK: 2})
        await chain["a"].replica.update(chain.version, [again], expected={CHUNK: 2})
        assert await chain.read("b") == b""
        assert await chain.equal("abc")

    on_chain(work)


def test_a_removal_that_comes_late_finds_the_chunk_of_another_writer() -> None:
    async def work(chain: ReplicaChain) -> None:
        await chain.write("a", b"old")
        late = chain.update(Action.REMOVE)
        late = late._replace(request=late.request._replace(channel=2))
        await chain.send("a", chain.update(Action.REMOVE))
        await chain["a"].replica.update(chain.version, removals(chain, CHUNK), expected={CHUNK: 1})  # absent is fine
        await chain.write("a", b"new")
        with pytest.raises(StaleChunk):
            await chain["a"].replica.update(chain.version, [late], expected={CHUNK: 1})
        assert await chain.read("c") == b"new"

    on_chain(work)


def test_a_version_is_compared_once_what_is_pending_is_settled() -> None:
    async def work(chain: ReplicaChain) -> None:
        await chain.write("a", b"old")
        service = chain.wire.services.pop("c")
        with pytest.raises(UpdateUnknown):
            await chain.write("a", b"new")
        chain.wire.services["c"] = service
        with pytest.raises(StaleChunk):
            await chain["a"].replica.update(chain.version, removals(chain, CHUNK), expected={CHUNK: 1})
        assert [await chain.read(name) for name in "abc"] == [b"new"] * 3

    on_chain(work)


def test_a_full_disk_refuses_and_leaves_nothing_behind() -> None:
    for full in "abc":

        async def work(chain: ReplicaChain, full: str = full) -> None:
            await chain.write("a", b"old")
            capacity, chain[full].disk._capacity_bytes = chain[full].disk._capacity_bytes, 0
            with pytest.raises(NoSpace):
                await chain.write("a", bytes(1 << 20))
            assert not any([await chain[name].is_pending() for name in "abc"])
            chain[full].disk._capacity_bytes = capacity
            await chain.write("a", b"new")
            assert [await chain.read(name) for name in "abc"] == [b"new"] * 3
            assert await chain.equal("abc")

        on_chain(work)


@pytest.mark.parametrize("lost", ["b", "c"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_lost_connection_is_not_the_clients_problem(lost: str, when: str) -> None:
    async def work(chain: ReplicaChain) -> None:
        losses = [UpdateUnknown("the connection broke")]

        async def lose(address: str, request: Message) -> None:
            if isinstance(request, Forward) and address == lost and losses:
                raise losses.pop()

        setattr(chain.wire, when, lose)
        await chain.write("a", b"new")
        assert [await chain.read(name) for name in "abc"] == [b"new"] * 3
        (state,) = await chain["a"].engine.states([CHUNK])
        assert state is not None and state.version == 1
        assert await chain.equal("abc")

    on_chain(work)


def test_with_nobody_to_forward_to_the_outcome_is_unknown_and_settled_later() -> None:
    async def work(chain: ReplicaChain) -> None:
        service = chain.wire.services.pop("c")
        with pytest.raises(UpdateUnknown):
            await chain.write("a", b"new")
        with pytest.raises(Unavailable):
            await chain.read("a")
        chain.wire.services["c"] = service
        await chain.until(lambda: _is(chain, "a", b"new"))
        assert await chain.equal("abc"), "nobody sent it again, and still no chunk stays dirty"

    on_chain(work)


def test_a_flipped_bit_is_repaired_from_another_replica() -> None:
    async def work(chain: ReplicaChain) -> None:
        await chain.write("a", b"precious" * 1000)
        record = await chain["b"].engine.record(CHUNK)
        assert record is not None and record.committed is not None
        file, block = chain["b"].engine.allocator.place(record.committed.position)
        chain["b"].disk.flip_bit(file, block + 100)
        with pytest.raises(Corruption):
            await chain.read("b")
        await chain.runtime.sleep(1.0)
        assert await chain.read("b") == b"precious" * 1000
        assert chain["b"].replica.repairer.repaired == 1

    on_chain(work)


def test_a_partial_write_over_damage_repairs_it_first() -> None:
    async def work(chain: ReplicaChain) -> None:
        await chain.write("a", b"precious" * 1000)
        record = await chain["b"].engine.record(CHUNK)
        assert record is not None and record.committed is not None
        file, block = chain["b"].engine.allocator.place(record.committed.position)
        chain["b"].disk.flip_bit(file, block + 100)
        await chain.write("a", b"P")
        assert [await chain.read(name) for name in "abc"] == [b"P" + (b"precious" * 1000)[1:]] * 3

    on_chain(work)
