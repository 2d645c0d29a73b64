"""KV events: a router that follows them knows what is there, and reads them as vLLM's.

Run: pytest tests/kvcache/test_events.py
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import emberkv
import msgspec
import numpy as np
import pytest
from emberfs.errors import ProtocolError
from emberfs.testing.sim.loop import SimRuntime
from emberkv import events
from emberkv.events import AllBlocksCleared, BlockRemoved, BlockStored, EventBatch, EventFeed
from emberkv.keys import ROOT
from emberkv.pool import Pool
from emberkv.publisher import Publisher
from emberkv.service import KvService

from tests.kvcache.serving import Server
from tests.kvcache.test_pool import NAMESPACE, TENANT, Bench, chain, run


class Router:
    """What somebody knows who hears the events."""

    def __init__(self) -> None:
        self.there: dict[bytes, bytes | None] = {}

    def hear(self, batch: EventBatch) -> None:
        for event in batch.events:
            if isinstance(event, AllBlocksCleared):
                self.there.clear()
            elif isinstance(event, BlockRemoved):
                for key in event.block_hashes:
                    self.there.pop(key, None)
            else:
                above = event.parent_block_hash
                for key in event.block_hashes:
                    self.there[key], above = above, key

    def hear_all(self, feed: EventFeed) -> None:
        for _ in range(100):
            heard = list(feed.take(1.0))
            for name, batch in heard:
                assert name == NAMESPACE.name
                self.hear(msgspec.msgpack.decode(msgspec.msgpack.encode(batch), type=EventBatch))
            if not heard:
                return


def pages_of(pool: Pool) -> dict[bytes, bytes | None]:
    table = pool.table
    return {
        key: None if table.parent_key(slot) == ROOT else table.parent_key(slot)
        for key, slot in table.slots_of(TENANT).items()
        if table.place(slot, 0) is not None
    }


@pytest.mark.parametrize("seed", range(6))
def test_who_follows_knows_what_is_there(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "RESYNC_SLOTS", 16)
    monkeypatch.setattr(events, "PAGES_MAX", 60)

    async def work(runtime: SimRuntime) -> None:
        rng = random.Random(seed)
        bench = Bench(runtime, capacity_bytes=2 << 20)
        pool = await bench.open()
        for prompt in range(5):
            await bench.put(pool, chain(prompt, 8))
        feed, router = EventFeed(), Router()
        feed.follow(pool)
        for _ in range(120):
            act, keys = rng.random(), chain(rng.randrange(40), rng.randrange(1, 12))
            if act < 0.6:
                await bench.put(pool, keys)
            elif act < 0.7:
                await pool.remove(TENANT, keys[-1:])
            elif act < 0.75:
                pool.match(TENANT, b"".join(keys), 30.0)
            if rng.random() < 0.3:
                for _, batch in feed.take(1.0):
                    router.hear(batch)
        router.hear_all(feed)
        assert router.there == pages_of(pool) and pool.space.counts.evicted_pages
        await pool.erase(TENANT)
        router.hear_all(feed)
        assert router.there == {}
        bench.kill(pool)

    run(work, seed)


def test_a_service_tells_of_what_it_takes_over() -> None:
    async def work(runtime: SimRuntime) -> None:
        bench = Bench(runtime)
        feed, router = EventFeed(), Router()

        def service() -> KvService:
            return KvService(bench.files, runtime, root="/kv", store="x", config=bench.config, events=feed)

        for _ in range(2):
            serving = service()
            pool = await serving.pools.get(NAMESPACE)
            pool.tenant("tenant")
            await bench.put(pool, chain(1, 5))
            router.hear_all(feed)
            assert list(router.there) == chain(1, 5)
            router.there[b"gone meanwhile"] = None
            await serving.close()
        pool._wal.is_lost = True
        assert list(feed.take(1.0)) == []

    run(work)


def test_tokens_are_told_with_what_is_put(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "TOKENS_MAX", 5)

    async def work(runtime: SimRuntime) -> None:
        bench = Bench(runtime)
        pool = await bench.open()
        feed = EventFeed(tells_tokens=True)
        feed.follow(pool)
        list(feed.take(1.0))

        async def put(keys: list[bytes], told: list[int]) -> list[list[int]]:
            data = np.array(told, "<u4").tobytes()
            number, _, places = await pool.reserve(1, TENANT, 0, keys, [ROOT, *keys[:-1]], [100] * len(keys))
            with feed.with_tokens(pool, pool.reserved(number, 1), data):
                pool.commit(number, 1, [0] * len(places))
            return [event.token_ids for _, batch in feed.take(1.0) for event in batch.events
                    if isinstance(event, BlockStored)]  # fmt: skip

        assert await put(chain(1, 3), [1, 0, 1]) == [[1, 0, 1]]
        assert await put(chain(2, 6), [2, 0, 1, 2, 3, 4]) == [[]], "they are more than may wait"
        assert await put(chain(3, 2), [3, 0]) == [[3, 0]]
        with pytest.raises(ProtocolError, match="2 pages have 2 tokens, not 1"):
            await put(chain(4, 2), [4])
        quiet = EventFeed()
        quiet.follow(pool)
        with quiet.with_tokens(pool, chain(5, 1), bytes(4)):
            await bench.put(pool, chain(5, 1))
        told = [event for _, batch in quiet.take(1.0) for event in batch.events if isinstance(event, BlockStored)]
        assert told and not any(event.token_ids for event in told)

    run(work)


KEY, ABOVE = bytes(32), bytes([1]) * 32
BATCH = EventBatch(
    12.5, [BlockStored([KEY], ABOVE, [], 64, None, "STORAGE", None, ownership="emberkv"),
           BlockRemoved([KEY], "STORAGE", group_idx=1), AllBlocksCleared()],
)  # fmt: skip


def test_events_are_shaped_as_vllms() -> None:
    ts, told, _ = msgspec.msgpack.decode(msgspec.msgpack.encode(BATCH))
    assert ts == 12.5 and told == [
        {"type": "BlockStored", "block_hashes": [KEY], "parent_block_hash": ABOVE, "token_ids": [], "block_size": 64,
         "lora_id": None, "medium": "STORAGE", "lora_name": None, "ownership": "emberkv"},
        {"type": "BlockRemoved", "block_hashes": [KEY], "medium": "STORAGE", "group_idx": 1},
        {"type": "AllBlocksCleared"},
    ]  # fmt: skip


def test_vllm_reads_them() -> None:
    theirs = pytest.importorskip("vllm.distributed.kv_events")
    read = msgspec.msgpack.decode(msgspec.msgpack.encode(BATCH), type=theirs.KVEventBatch)
    assert read.events[0].block_hashes == [KEY] and isinstance(read.events[2], theirs.AllBlocksCleared)
    for name in ("BlockStored", "BlockRemoved"):
        ours = msgspec.structs.fields(getattr(events, name))
        assert [each.name for each in ours] == [each.name for each in msgspec.structs.fields(getattr(theirs, name))]


def test_events_are_published(serve: Callable[..., Server], tmp_path: Path) -> None:
    zmq = pytest.importorskip("zmq")
    endpoint, replay = f"ipc://{tmp_path}/events", f"ipc://{tmp_path}/replay"
    server = serve(more=("--events", endpoint, "--events-replay", replay, "--events-tokens"))
    address = server.address
    router = Router()
    with zmq.Context() as context, context.socket(zmq.SUB) as sub, context.socket(zmq.DEALER) as dealer:
        sub.setsockopt(zmq.SUBSCRIBE, NAMESPACE.name.encode())
        sub.connect(endpoint)
        sub.rcvtimeo = dealer.rcvtimeo = 30_000
        dealer.connect(replay)
        with emberkv.connect(address, NAMESPACE) as cache:
            keys = cache.keys(range(5))
            cache.put(keys, [b"x" * 100] * 5, durable="committed")
            cache.remove(keys[3:])
            asked: list[Any] = []
            while list(router.there) != keys[:3]:
                dealer.send_multipart((b"", (0).to_bytes(8, "big")))
                router.there.clear()
                while (frames := dealer.recv_multipart())[2] != (-1).to_bytes(8, "big", signed=True):
                    _, topic, number, body = frames
                    assert topic == NAMESPACE.name.encode()
                    asked.append(number)
                    router.hear(msgspec.msgpack.decode(body, type=EventBatch))
            assert asked[0] == bytes(8)
            # The subscription may begin late, or early enough to tell of the first put as well.
            with pytest.raises(ValueError, match="2 pages have 2 tokens, not 3"):
                cache.put(keys[3:], [b"x" * 100] * 2, parent=keys[2], tokens=[1, 2, 3])
            cache.put(keys[3:], [b"x" * 100] * 2, parent=keys[2], tokens=[3, 4])
            told: list[list[int]] = []
            while told[-1:] != [[3, 4]]:
                topic, _, body = sub.recv_multipart()
                batch = msgspec.msgpack.decode(body, type=EventBatch)
                told += [event.token_ids for event in batch.events if isinstance(event, BlockStored)]
                router.hear(batch)
            assert list(router.there) == keys
    server.end()


def test_a_subscriber_that_is_slow_is_told_all_again(tmp_path: Path) -> None:
    zmq = pytest.importorskip("zmq")
    count, left = 4000, iter(range(4000))

    class Feed(EventFeed):
        def take(self, now_s: float) -> Iterator[tuple[str, EventBatch]]:
            if next(left, None) is not None:
                yield "n", EventBatch(now_s, [BlockRemoved([b"k" * 32] * 500, "STORAGE")])

    replay = f"ipc://{tmp_path}/replay"
    publisher = Publisher(Feed(), SimRuntime(0), endpoint=f"ipc://{tmp_path}/events", replay_endpoint=replay)
    try:
        for _ in range(count):
            publisher.tell()
        with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
            dealer.linger, dealer.rcvtimeo = 0, 10
            dealer.connect(replay)
            dealer.send_multipart((b"", (7).to_bytes(8, "big")))
            numbers: list[int] = []
            while not numbers or numbers[-1] != -1:
                publisher.tell()
                while True:
                    try:
                        numbers.append(int.from_bytes(dealer.recv_multipart()[2], "big", signed=True))
                    except zmq.Again:  # It has taken what there was.
                        break
            assert numbers == [*range(7, count), -1]
            dealer.send_multipart((b"", b"\xff" * 8))  # From the end of the world on.
            dealer.rcvtimeo = 30_000
            while not publisher._router.poll(10):
                pass
            publisher.tell()
            assert dealer.recv_multipart()[2] == b"\xff" * 8
    finally:
        publisher._context.destroy(linger=0)
