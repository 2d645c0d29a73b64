"""vLLM's secondary tier: made by vLLM's spec and factory, driven by its TieringOffloadingManager as its scheduler does.

The GPU is left out: where it would fill or read chunks of the CPU tier, the tests do. Run: make test-adapters.
"""

from __future__ import annotations

import itertools
import threading
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from emberfs.errors import Unavailable
from emberkv import SeededKeys
from emberkv.adapters.vllm import EmberTier, name_of
from vllm.utils.hashing import sha256_cbor, xxhash_cbor
from vllm.v1.core import kv_cache_utils
from vllm.v1.kv_offload.base import LookupResult, ReqContext, ScheduleEndContext, make_offload_key
from vllm.v1.kv_offload.config import (
    OffloadingCacheConfig,
    OffloadingConfig,
    OffloadingGroupConfig,
    OffloadingModelConfig,
    OffloadingParallelConfig,
)
from vllm.v1.kv_offload.tiering.manager import TieringOffloadingManager
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

from tests.adapters.conftest import Service, flush

PARALLEL = {
    "rank": 0, "world_size": 1, "tp_size": 1, "pp_size": 1, "pcp_size": 1, "dcp_size": 1, "data_parallel_index": 0,
    "data_parallel_size": 1, "data_parallel_rank_local": None, "is_parallelism_agnostic": False,
}  # fmt: skip
CHUNKS = 8
CHUNK_BYTES = 64 << 10

STEP_END = ScheduleEndContext(new_req_ids=(), preempted_req_ids=())


class Engine:
    """vLLM's scheduler, as far as offloading sees it."""

    def __init__(
        self, address: str, *, model: str = "deepseek-ai/DeepSeek-V3", dtype: str = "bfloat16", block: int = 16,
        parallel: dict[str, Any] = PARALLEL, **tier: Any,
    ) -> None:  # fmt: skip
        entry = {"type": "EmberTier", "module_path": "emberkv.adapters.vllm", "address": address, "timeout_s": 1.0}
        config = OffloadingConfig(
            groups=(OffloadingGroupConfig(tokens_per_block=block, layer_names=("layer.0",), group_id=0),),
            worker_kv_bytes_per_block=CHUNK_BYTES // parallel["world_size"],
            enable_kv_cache_events=False,
            extra_config={"cpu_bytes_to_use": CHUNKS * CHUNK_BYTES, "secondary_tiers": [{**entry, **tier}]},
            engine_id=f"test-{uuid.uuid4()}",
            model=OffloadingModelConfig(name=model, dtype=dtype),
            cache=OffloadingCacheConfig(tokens_per_hash=16, blocks_per_chunk=1),
            parallel=OffloadingParallelConfig(**parallel),
            kv_cache_layout="NHD",
        )
        manager = TieringOffloadingSpec(config).get_manager()
        assert isinstance(manager, TieringOffloadingManager)
        self.manager = manager
        self.memory = manager.primary_tier.get_kv_memoryview().cast("B")
        (tier_manager,) = manager.secondary_tiers
        assert isinstance(tier_manager, EmberTier)
        self.tier = tier_manager
        self.callers: set[int] = set()
        """Threads that have called the service or the storage servers."""
        call = self.tier._door.call

        def noted(*given: Any) -> Any:
            self.callers.add(threading.get_ident())
            return call(*given)

        self.tier._door.call = noted  # type: ignore[method-assign]

    def request(self, name: str) -> ReqContext:
        context = ReqContext(req_id=name)
        self.manager.on_new_request(context)
        return context

    def finish(self, context: ReqContext) -> None:
        self.manager.on_request_finished(context)

    def chunk(self, number: int) -> memoryview:
        return self.memory[number * CHUNK_BYTES : (number + 1) * CHUNK_BYTES]

    def compute(self, context: ReqContext, keys: list[Any], fills: list[int]) -> None:
        """Chunks come from the GPU into the CPU tier, and from there to ours."""
        for position, key in enumerate(keys):
            context.set_offload_key_position(key, 16 * (position + 1))
        prepared = self.manager.prepare_store(keys, context)
        assert prepared is not None
        for key, number in zip(prepared.keys_to_store, prepared.store_spec.chunk_ids, strict=True):
            self.chunk(int(number))[:] = bytes([fills[keys.index(key)]]) * CHUNK_BYTES
        if prepared.keys_to_store:
            self.manager.complete_store(prepared.keys_to_store, context)
        self.step(until=lambda: not self.manager.has_pending_work())

    def step(self, until: Callable[[], bool]) -> None:
        """Steps of the scheduler, as many as it takes."""
        while True:
            self.manager.on_schedule_end(STEP_END)
            if until():
                return
            threading.Event().wait(0.002)  # The model computes.

    def find(self, context: ReqContext, keys: list[Any]) -> list[LookupResult]:
        """What the scheduler finds once it is known; what was said in the first step is told by `first`."""
        self.first = [self.manager.lookup(key, context) for key in keys]
        results = self.first

        def known() -> bool:
            nonlocal results
            results = [self.manager.lookup(key, context) for key in keys]
            return not {LookupResult.RETRY, LookupResult.HIT_PENDING} & set(results)

        self.step(known)
        return results

    def read(self, context: ReqContext, keys: list[Any]) -> list[int]:
        """The one byte of each chunk that goes to the GPU."""
        spec = self.manager.prepare_load(keys, context)
        found = [bytes(self.chunk(int(number))) for number in spec.chunk_ids]
        self.manager.complete_load(keys, context)
        assert all(len(set(chunk)) == 1 for chunk in found)
        return [chunk[0] for chunk in found]


@pytest.fixture
def engine(service: Service) -> Iterator[Callable[..., Engine]]:
    made: list[Engine] = []

    def start(**given: Any) -> Engine:
        made.append(Engine(service.address, **given))
        return made[-1]

    yield start
    for each in made:
        assert threading.get_ident() not in each.callers, "the scheduler's thread waited for a socket"
        each.memory.release()
        each.manager.shutdown()


def key(number: int, group: int = 0) -> Any:
    return make_offload_key(number.to_bytes(32, "big"), group)


MISS, HIT, RETRY = LookupResult.MISS, LookupResult.HIT, LookupResult.RETRY


def test_what_one_engine_computed_another_one_finds(engine: Callable[..., Engine]) -> None:
    one, other = engine(), engine()
    keys = [key(number) for number in range(6)]
    asking = one.request("a")
    one.compute(asking, keys[:4], [1, 2, 3, 4])
    one.compute(asking, keys[4:], [5, 6])
    one.finish(asking)

    context = other.request("b")
    assert other.find(context, [*keys, key(99)]) == [HIT] * 6 + [MISS]
    assert other.first == [RETRY] * 7  # Nothing was waited for.
    assert other.read(context, keys) == [1, 2, 3, 4, 5, 6]
    other.finish(context)
    assert not other.manager.has_pending_work()


def parents(tier: EmberTier) -> dict[bytes, bytes]:
    """Of every page of the cache, as it lies there."""
    cache = tier._door._cache
    assert cache is not None
    listing = cache.browse()
    return dict(zip(listing.hit.keys, listing.parents, strict=True))


def test_a_conversation_that_goes_on_is_one_chain(engine: Callable[..., Engine]) -> None:
    only = engine()
    keys = [key(number) for number in range(4)]
    only.compute(only.request("a"), keys[:2], [1, 2])
    later = only.request("b")
    only.compute(later, keys, [1, 2, 3, 4])  # The CPU tier has the first two.
    cache = only.tier._door._cache
    assert cache is not None
    pages = cache.opaque_keys([name_of(bytes(each)) for each in keys])
    assert parents(only.tier) == dict(zip(pages, [bytes(32), *pages[:-1]], strict=True))
    cache.remove(pages[:1])
    assert not any(cache.exists(pages))
    again = only.request("d")
    only.manager.reset_cache()
    again.set_offload_key_position(keys[0], 16)
    again.set_offload_key_position(keys[1], 32)
    (third,) = cache.opaque_keys([name_of(bytes(keys[2]))])
    prepared = only.manager.prepare_store(keys[2:3], again)
    again.set_offload_key_position(keys[2], 48)
    assert prepared is not None
    only.manager.complete_store(keys[2:3], again)
    only.step(until=lambda: not only.manager.has_pending_work())
    assert parents(only.tier)[third] == bytes(32) and cache.exists([third]) == [True]  # What it hung on is gone.


def test_the_cpu_tier_is_smaller_than_ours(engine: Callable[..., Engine]) -> None:
    only = engine()
    for prompt in range(4):
        context = only.request(f"put {prompt}")
        only.compute(
            context, [key(prompt * 10 + each) for each in range(CHUNKS)], [prompt * 10 + each for each in range(8)]
        )
        only.finish(context)
    for prompt in range(4):
        context = only.request(f"get {prompt}")
        keys = [key(prompt * 10 + each) for each in range(CHUNKS)]
        assert only.find(context, keys) == [HIT] * CHUNKS
        assert only.read(context, keys) == [prompt * 10 + each for each in range(CHUNKS)]
        only.finish(context)


def test_what_differs_in_bytes_is_not_found(engine: Callable[..., Engine]) -> None:
    one = engine()
    context = one.request("a")
    one.compute(context, [key(1)], [7])
    assert one.find(context, [key(1, group=1)]) == [MISS]
    two_ranks = {**PARALLEL, "world_size": 2, "tp_size": 2}
    for given in (
        {"model": "other"}, {"dtype": "fp8"}, {"block": 32}, {"parallel": two_ranks}, {"revision": "r2"},
        {"salt": "s"}, {"tenant": "other"},
    ):  # fmt: skip
        other = engine(**given)
        assert other.find(other.request("b"), [key(1)]) == [MISS]


def test_other_parallelism_finds_the_same_bytes(engine: Callable[..., Engine]) -> None:
    free = {**PARALLEL, "is_parallelism_agnostic": True}
    one, other = engine(parallel=free), engine(parallel={**free, "world_size": 2, "tp_size": 2})
    one.compute(one.request("a"), [key(1)], [7])
    context = other.request("b")
    assert other.find(context, [key(1)]) == [HIT]
    assert other.read(context, [key(1)]) == [7]


def test_a_page_that_goes_between_look_up_and_load_is_a_miss(
    engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = engine(), engine()
    keys = [key(number) for number in range(3)]
    one.compute(one.request("a"), keys, [1, 2, 3])
    cache = other.tier._door._cache
    assert cache is not None
    read = cache.get_into
    monkeypatch.setattr(cache, "get_into", lambda *given: [*read(*given)[:-1], False])
    context = other.request("b")
    assert other.find(context, keys) == [HIT, HIT, MISS]
    assert other.read(context, keys[:2]) == [1, 2]


def test_a_service_that_does_not_answer_keeps_no_step_waiting(engine: Callable[..., Engine], service: Service) -> None:
    only = engine(retry_s=1e-9)
    keys = [key(number) for number in range(3)]
    context = only.request("a")
    only.compute(context, keys, [1, 2, 3])
    service.freeze()
    assert only.find(context, [key(50)]) == [MISS]
    only.compute(context, [key(60)], [9])  # The job fails, and its chunk is let go.
    service.thaw()
    only.manager.reset_cache()  # vLLM's own: waits for jobs, and forgets the CPU tier.
    for attempt in itertools.count():
        again = only.request(f"again {attempt}")
        if only.find(again, keys) == [HIT] * 3:
            break
        only.finish(again)
    assert only.read(again, keys) == [1, 2, 3]


def test_a_service_killed_under_load_fails_no_request(engine: Callable[..., Engine], service: Service) -> None:
    only = engine(retry_s=0.001)
    keys = [key(number) for number in range(CHUNKS)]
    only.compute(only.request("a"), keys, [number + 1 for number in range(CHUNKS)])
    flush(only.tier._door)
    only.callers.clear()  # That was the test's own thread.
    only.manager.reset_cache()
    context = only.request("b")
    assert {only.manager.lookup(key, context) for key in keys} == {RETRY}
    only.manager.on_schedule_end(STEP_END)
    service.kill()
    found = only.find(context, keys)  # Whatever was answered in time.
    assert set(found) <= {HIT, MISS}
    hits = [index for index, each in enumerate(found) if each == HIT]
    assert only.read(context, [keys[index] for index in hits]) == [index + 1 for index in hits]
    only.finish(context)

    service.start()
    only.manager.reset_cache()
    for attempt in itertools.count():
        again = only.request(f"again {attempt}")
        if only.find(again, keys) == [HIT] * CHUNKS:
            break
        only.finish(again)
    assert only.read(again, keys) == [number + 1 for number in range(CHUNKS)]


def test_a_failing_cache_fails_no_request(engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    only = engine()
    context = only.request("a")
    only.compute(context, [key(1)], [1])

    def fail(*_: Any, **__: Any) -> Any:
        raise Unavailable("injected")

    cache = only.tier._door._cache
    assert cache is not None
    monkeypatch.setattr(cache, "get_into", fail)
    only.manager.reset_cache()
    again = only.request("b")
    assert only.find(again, [key(1)]) == [MISS]


def test_a_random_seed_is_refused(engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    early = engine()
    kv_cache_utils.init_none_hash(xxhash_cbor)
    with pytest.raises(SeededKeys, match="--prefix-caching-hash-algo sha256"):
        early.request("a")  # vLLM makes its tiers before it chooses the seed.
    with pytest.raises(SeededKeys):
        engine()
    kv_cache_utils.init_none_hash(sha256_cbor)
    early.request("a")
