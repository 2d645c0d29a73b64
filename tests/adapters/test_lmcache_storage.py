"""LMCache's storage plug-in: made by LMCache's launcher from a configuration, driven by its StorageManager.

The GPU is left out: chunks come from and go to memory of LMCache's CPU backend. Run: make test-adapters.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from emberkv.adapters.lmcache_storage import EmberStorage
from lmcache.utils import CacheEngineKey
from lmcache.v1.config import LMCacheEngineConfig
from lmcache.v1.event_manager import EventManager
from lmcache.v1.memory_management import MemoryFormat
from lmcache.v1.metadata import LMCacheMetadata
from lmcache.v1.storage_backend.storage_manager import StorageManager

from tests.adapters.conftest import Service, flush

MODEL = "deepseek-ai/DeepSeek-V3"
CHUNK = 16
LAYERS = 3
NAME = "emberkv"

Make = Callable[..., StorageManager]


@pytest.fixture
def make(service: Service) -> Iterator[Make]:
    made: list[StorageManager] = []

    def manager(
        *, chunk: int = CHUNK, dtype: torch.dtype = torch.bfloat16, worker: int = 0, world: int = 1, mla: bool = False,
        dtype_told: str = "", config: dict[str, Any] | None = None, **settings: Any,
    ) -> StorageManager:  # fmt: skip
        given = LMCacheEngineConfig.from_dict(
            {
                "chunk_size": chunk,
                "local_cpu": False,  # Whatever is found comes from us.
                "max_local_cpu_size": 0.01,
                "pre_caching_hash_algorithm": "sha256_cbor",
                "storage_plugins": [NAME],
                "extra_config": {
                    f"storage_plugin.{NAME}.module_path": "emberkv.adapters.lmcache_storage",
                    f"storage_plugin.{NAME}.class_name": "EmberStorage",
                    "emberkv": {
                        "address": service.address,
                        "timeout_s": 1.0,
                        **settings,
                        **({"dtype": dtype_told} if dtype_told else {}),
                    },
                },
                **(config or {}),
            }
        )
        metadata = LMCacheMetadata(
            model_name=MODEL, world_size=world, local_world_size=world, worker_id=worker, local_worker_id=worker,
            kv_dtype=dtype, kv_shape=(LAYERS, 1 if mla else 2, chunk, 2, 8), use_mla=mla, role="worker",
            chunk_size=chunk,
        )  # fmt: skip
        made.append(StorageManager(given, metadata, EventManager()))
        return made[-1]

    yield manager
    for each in made:
        each.close()
        each.loop.close()  # LMCache leaves it.


def key(number: int, worker: int = 0, world: int = 1, **tags: str) -> CacheEngineKey:
    configs = {f"lmcache.tag.{name}": value for name, value in tags.items()}
    return CacheEngineKey(MODEL, world, worker, 2**63 + number, torch.bfloat16, configs)


def ours(manager: StorageManager) -> EmberStorage:
    backend = manager.storage_backends[NAME]
    assert isinstance(backend, EmberStorage)
    return backend


def chunk_of(manager: StorageManager, fill: float, tokens: int = CHUNK) -> Any:
    mla = manager.metadata.use_mla
    shapes, dtypes = manager.metadata.get_shapes(tokens), manager.metadata.get_dtypes()
    memory = manager.allocate(shapes, dtypes, MemoryFormat.KV_MLA_FMT if mla else MemoryFormat.KV_2LTD)
    assert memory is not None and memory.tensor is not None
    memory.tensor.fill_(fill)
    return memory


def put(manager: StorageManager, keys: list[CacheEngineKey], fills: list[float], tokens: int = CHUNK) -> None:
    """As LMCache's engine does; returns once nothing is being stored."""
    objects = [chunk_of(manager, fill, tokens) for fill in fills]
    manager.batched_put(keys, objects)
    while any(ours(manager).exists_in_put_tasks(each) for each in keys):
        pass
    assert [each.get_ref_count() for each in objects] == [0] * len(objects)  # Nothing of ours holds them.


def values(objects: list[Any]) -> list[float | None]:
    """The one value of each chunk; then they are let go."""
    found: list[float | None] = []
    for each in objects:
        if each is None:
            found.append(None)
            continue
        assert len(set(each.tensor.flatten().tolist())) == 1
        found.append(float(each.tensor.flatten()[0]))
        each.ref_count_down()
        assert each.get_ref_count() == 0
    return found


@pytest.mark.parametrize("mla", [False, True])
def test_what_one_engine_stored_another_one_loads(make: Make, mla: bool) -> None:
    one, other = make(mla=mla), make(mla=mla)
    keys = [key(number) for number in range(6)]
    put(one, keys[:5], [1, 2, 3, 4, 5])
    count, where = other.batched_contains(keys, pin=True)
    assert count == 5 and list(where) == [NAME]
    loaded = other.batched_get(keys[:5], location=NAME)
    assert [each.get_shape() for each in loaded if each] == [torch.Size([1 if mla else 2, LAYERS, CHUNK, 16])] * 5
    assert values(loaded) == [1, 2, 3, 4, 5]
    other.batched_unpin(keys[:5], [NAME])
    assert values(other.batched_get([keys[5], keys[2]], location=NAME)) == [None, 3]
    assert values([ours(other).get_blocking(keys[4]), ours(other).get_blocking(keys[5])]) == [5, None]
    assert other.contains(keys[0]) == NAME and other.contains(keys[5]) is None


def test_the_last_chunk_of_a_prompt_is_shorter(make: Make) -> None:
    manager = make()
    put(manager, [key(1)], [7], tokens=5)
    (loaded,) = manager.batched_get([key(1)], location=NAME)
    assert loaded is not None and loaded.get_shape() == torch.Size([2, LAYERS, 5, 16])
    assert values([loaded]) == [7]


def test_lmcaches_event_loop_goes_on_and_gets_the_leading_chunks(make: Make) -> None:
    manager = make()
    keys = [key(number) for number in range(4)]
    put(manager, keys[:2], [1, 2])
    put(manager, keys[3:], [4])
    backend = ours(manager)

    def in_loop(work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, manager.loop).result(60)

    assert in_loop(backend.batched_async_contains("a", keys, True)) == 2
    assert values(in_loop(backend.batched_get_non_blocking("a", keys))) == [1, 2]
    assert in_loop(backend.batched_get_non_blocking("a", [key(9)])) == []


def test_memory_of_a_load_that_was_cancelled_is_given_back(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    manager, began, goes_on = make(), threading.Event(), threading.Event()
    backend, loaded = ours(manager), list[Any]()
    put(manager, [key(1)], [1])
    load = backend.batched_get_blocking

    def slow(keys: list[CacheEngineKey]) -> list[Any]:
        loaded.extend(load(keys))
        began.set()
        goes_on.wait(60)
        return list(loaded)

    monkeypatch.setattr(backend, "batched_get_blocking", slow)
    asked = asyncio.run_coroutine_threadsafe(backend.batched_get_non_blocking("a", [key(1)]), manager.loop)
    assert began.wait(60) and asked.cancel()
    asyncio.run_coroutine_threadsafe(asyncio.sleep(0), manager.loop).result(60)  # It has heard of it.
    goes_on.set()
    while loaded[0].get_ref_count():
        pass


def test_all_chunks_are_told_of_whatever_lmcache_makes_of_one(make: Make) -> None:
    manager, told = make(), list[CacheEngineKey]()

    def note(each: CacheEngineKey) -> None:
        told.append(each)
        raise ValueError(each)

    keys, objects = [key(1), key(2)], [chunk_of(manager, 1), chunk_of(manager, 2)]
    ours(manager).batched_submit_put_task(keys, objects, on_complete_callback=note)
    while len(told) < 2:
        pass
    assert told == keys
    for each in objects:
        each.ref_count_down()


def test_nothing_is_mixed_up(make: Make) -> None:
    manager = make()
    keys = [key(1), key(1, worker=1, world=2), key(1, world=2), key(1, user="a"), key(2)]
    put(manager, keys, [1, 2, 3, 4, 5])
    assert values(manager.batched_get(keys, location=NAME)) == [1, 2, 3, 4, 5]
    for other in ({"chunk": 32}, {"dtype": torch.float16}, {"mla": True}, {"revision": "r2"}, {"salt": "s"}):
        assert make(**other).batched_contains(keys) == (0, {})


def test_formats_that_an_engine_keeps_as_bytes_are_not_mixed_up(make: Make) -> None:
    one = make(dtype=torch.uint8, dtype_told="fp8_e4m3")
    put(one, [key(1)], [1])
    assert one.batched_contains([key(1)])[0] == 1
    assert make(dtype=torch.uint8, dtype_told="fp8_e5m2").batched_contains([key(1)]) == (0, {})
    assert NAME not in make(dtype=torch.uint8).storage_backends  # LMCache goes on without us.


def test_what_is_removed_is_gone(make: Make) -> None:
    manager = make()
    put(manager, [key(1), key(2)], [1, 2])
    assert manager.batched_contains([key(1), key(2)])[0] == 2
    assert manager.batched_remove([key(2)]) == 1
    assert values(manager.batched_get([key(1), key(2)], location=NAME)) == [1, None]


def test_without_memory_it_is_a_miss(make: Make) -> None:
    manager = make()
    put(manager, [key(1)], [1])
    held = []
    while (memory := manager.allocate(*_whole(manager), busy_loop=False)) is not None:
        held.append(memory)
    assert manager.batched_get([key(1)], location=NAME) == [None]
    held.pop().ref_count_down()
    assert values(manager.batched_get([key(1)], location=NAME)) == [1]
    for each in held:
        each.ref_count_down()


def _whole(manager: StorageManager) -> tuple[Any, Any]:
    return manager.metadata.get_shapes(), manager.metadata.get_dtypes()


def test_a_killed_service_is_a_miss_until_it_is_back(make: Make, service: Service) -> None:
    manager, keys = make(retry_s=1e-9), [key(number) for number in range(3)]
    put(manager, keys, [1, 2, 3])
    flush(ours(manager)._door)
    service.kill()
    assert manager.batched_contains(keys) == (0, {})
    assert values(manager.batched_get(keys, location=NAME)) == [None] * 3
    put(manager, [key(9)], [9])  # It is not stored, and no memory is kept.
    service.start()
    while manager.batched_contains(keys)[0] != 3:
        pass
    assert values(manager.batched_get(keys, location=NAME)) == [1, 2, 3]
    assert manager.contains(key(9)) is None


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"pre_caching_hash_algorithm": "builtin"}, "pre_caching_hash_algorithm: sha256_cbor"),
        ({"use_layerwise": True}, "use_layerwise"),
        ({"extra_config": "none"}, "address must be given"),
    ],
)
def test_what_cannot_work_is_refused_with_what_to_set(
    make: Make, config: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    names = {"module_path": "emberkv.adapters.lmcache_storage", "class_name": "EmberStorage"}
    if "extra_config" in config:
        config = {"extra_config": {f"storage_plugin.{NAME}.{name}": value for name, value in names.items()}}
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("lmcache.v1.storage_backend")
    logger.addHandler(handler)
    try:
        manager = make(config=config)
    finally:
        logger.removeHandler(handler)
    assert NAME not in manager.storage_backends  # LMCache goes on without us.
    assert any(said in record for record in records), records


def test_a_fixed_seed_is_fine(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "PYTHONHASHSEED", "0")
    assert NAME in make(config={"pre_caching_hash_algorithm": "builtin"}).storage_backends
