"""LMCache's L2 adapter: made by LMCache's factory, driven as its controllers and its own benchmark drive it.

Run: make test-adapters.
"""

from __future__ import annotations

import gc
import json
import os
import select
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from emberkv.adapters.lmcache import chains_of
from lmcache.lmcache_native import Bitmap
from lmcache.v1.distributed.api import ObjectKey
from lmcache.v1.distributed.l2_adapters.factory import create_l2_adapter_from_registry
from lmcache.v1.distributed.l2_adapters.plugin_l2_adapter import PluginL2AdapterConfig
from lmcache.v1.memory_management import MemoryFormat, MemoryObj, MemoryObjMetadata, TensorMemoryObj

from tests.adapters.conftest import Service, flush

MODEL = "deepseek-ai/DeepSeek-V3"
SIZE = 50_000

Make = Callable[..., Any]


@pytest.fixture
def make(service: Service) -> Iterator[Make]:
    made = []

    def adapter(**params: Any) -> Any:
        config = PluginL2AdapterConfig.from_dict(
            {
                "module_path": "emberkv.adapters.lmcache",
                "class_name": "EmberL2Adapter",
                "adapter_params": {"address": service.address, "dtype": "bfloat16", "timeout_s": 1.0, **params},
            }
        )
        made.append(create_l2_adapter_from_registry(config))
        return made[-1]

    yield adapter
    for each in made:
        each.close()


def key(number: int, **fields: Any) -> ObjectKey:
    return ObjectKey(**{"chunk_hash": number.to_bytes(32, "big"), "model_name": MODEL, "kv_rank": 0, **fields})


def object_of(fill: int, size: int = SIZE) -> MemoryObj:
    metadata = MemoryObjMetadata(
        shape=torch.Size([size]), dtype=torch.uint8, address=0, phy_size=size, fmt=MemoryFormat.KV_2LTD, ref_count=1
    )
    return TensorMemoryObj(torch.full((size,), fill, dtype=torch.uint8), metadata, parent_allocator=None)


def wait_for(descriptor: int, ask: Callable[[], Any]) -> Any:
    """What LMCache's controllers do: sleep until the descriptor says so, then ask."""
    while True:
        assert select.select([descriptor], [], [], 60)[0], "nothing was told"
        os.read(descriptor, 8)
        if (result := ask()) not in (None, {}):
            return result


def wait_for_all(descriptor: int, ask: Callable[[int], Any], tasks: list[int]) -> list[Any]:
    """The results of tasks, in their order."""
    results: dict[int, Any] = {}
    while len(results) < len(tasks):
        assert select.select([descriptor], [], [], 60)[0], "nothing was told"
        os.read(descriptor, 8)
        for task in set(tasks) - set(results):
            if (result := ask(task)) is not None:
                results[task] = result
    return [results[task] for task in tasks]


def store(adapter: Any, keys: list[ObjectKey], objects: list[MemoryObj]) -> Any:
    task = adapter.submit_store_task(keys, objects)
    return wait_for(adapter.get_store_event_fd(), adapter.pop_completed_store_tasks)[task]


def look_up(adapter: Any, keys: list[ObjectKey]) -> list[int]:
    task = adapter.submit_lookup_and_lock_task(keys, {})
    found: Bitmap = wait_for(adapter.get_lookup_and_lock_event_fd(), lambda: adapter.query_lookup_and_lock_result(task))
    assert adapter.query_lookup_and_lock_result(task) is None  # It is told once.
    return found.get_indices_list()


def load(adapter: Any, keys: list[ObjectKey], objects: list[MemoryObj]) -> list[int]:
    task = adapter.submit_load_task(keys, objects)
    loaded: Bitmap = wait_for(adapter.get_load_event_fd(), lambda: adapter.query_load_result(task))
    return loaded.get_indices_list()


def fills(objects: list[MemoryObj]) -> list[int]:
    for each in objects:
        assert len(set(bytes(each.byte_array))) == 1
    return [bytes(each.byte_array)[0] for each in objects]


def test_what_one_server_stored_another_one_loads(make: Make) -> None:
    one, other = make(), make()
    descriptors = {
        descriptor
        for adapter in (one, other)
        for descriptor in (
            adapter.get_store_event_fd(),
            adapter.get_lookup_and_lock_event_fd(),
            adapter.get_load_event_fd(),
        )
    }
    assert len(descriptors) == 6
    keys = [key(number) for number in range(20)]
    result = store(one, keys, [object_of(number) for number in range(20)])
    assert (result.is_successful(), result.bytes_transferred()) == (True, 20 * SIZE)
    again = store(one, keys, [object_of(number) for number in range(20)])
    assert (again.is_successful(), again.bytes_transferred()) == (True, 0)
    assert one.get_usage().total_bytes_used == 20 * SIZE

    wanted = [*keys, key(99)]
    assert look_up(other, wanted) == list(range(20))
    targets = [object_of(255) for _ in wanted]
    assert load(other, wanted, targets) == list(range(20))
    assert fills(targets) == [*range(20), 255]
    other.submit_unlock(wanted)
    assert load(other, keys[3:5], targets[:2]) == [0, 1]  # Without a look-up before it.
    assert fills(targets[:2]) == [3, 4]


def test_nothing_is_mixed_up(make: Make) -> None:
    adapter = make()
    same = {"chunk_hash": bytes(32)}
    keys = [
        key(0, **same, kv_rank=1), key(0, **same, kv_rank=2), key(0, **same, object_group_id=1),
        key(0, **same, cache_salt="a"), key(0, **same, model_name="other"),
    ]  # fmt: skip
    store(adapter, keys, [object_of(number) for number in range(5)])
    targets = [object_of(255) for _ in keys]
    assert load(adapter, keys, targets) == [0, 1, 2, 3, 4]
    assert fills(targets) == [0, 1, 2, 3, 4]
    assert load(adapter, keys[:1], [object_of(255, SIZE - 1)]) == []  # Of another size: not this object.
    for fields in ({"dtype": "fp8"}, {"layout": "other"}, {"chunk_size": 512}, {"revision": "r2"}, {"salt": "s"}):
        assert look_up(make(**fields), keys) == []


def test_keys_that_follow_no_other_go_in_one_call() -> None:
    ranks = [key(0, kv_rank=1), key(9, kv_rank=7), key(1, kv_rank=1), key(9, kv_rank=8), key(9, model_name="other")]
    assert chains_of(ranks) == [[0, 2], [1, 3], [4]]


def test_what_is_deleted_is_gone(make: Make) -> None:
    adapter = make()
    keys = [key(number) for number in range(3)]
    store(adapter, keys, [object_of(number) for number in range(3)])
    adapter.delete([keys[2]])
    store(adapter, keys[:1], [object_of(0)])  # After it: both are work of the one thread that changes something.
    assert look_up(adapter, keys) == [0, 1]
    assert adapter.get_usage().total_bytes_used == 2 * SIZE


def test_a_service_that_does_not_answer_is_a_miss_in_time(make: Make, service: Service) -> None:
    adapter = make(retry_s=1e-9)
    keys = [key(number) for number in range(4)]
    store(adapter, keys, [object_of(number) for number in range(4)])
    assert look_up(adapter, keys) == [0, 1, 2, 3]
    service.freeze()
    assert look_up(adapter, [key(50)]) == []
    assert not store(adapter, [key(51)], [object_of(1)]).is_successful()
    assert adapter.report_status()["failed_calls"] >= 1
    service.thaw()
    while look_up(adapter, keys) != [0, 1, 2, 3]:
        pass
    targets = [object_of(255) for _ in keys]
    assert load(adapter, keys, targets) == [0, 1, 2, 3]
    assert fills(targets) == [0, 1, 2, 3]


def test_a_service_killed_under_load_is_a_miss_and_no_byte_is_wrong(make: Make, service: Service) -> None:
    adapter = make(retry_s=0.001)
    keys = [key(number) for number in range(64)]
    store(adapter, keys, [object_of(number) for number in range(64)])
    flush(adapter._doors[MODEL])
    targets = [object_of(255) for _ in keys]
    loads = [adapter.submit_load_task([keys[i]], [targets[i]]) for i in range(32)]
    stores = [adapter.submit_store_task([key(100 + i)], [object_of(100 + i)]) for i in range(16)]
    service.kill()
    loads += [adapter.submit_load_task([keys[i]], [targets[i]]) for i in range(32, 64)]
    results = wait_for_all(adapter.get_load_event_fd(), adapter.query_load_result, loads)
    for number, (result, target) in enumerate(zip(results, targets, strict=True)):
        if result.get_indices_list():
            assert fills([target]) == [number]
    assert not results[-1].get_indices_list()
    ended: dict[int, Any] = {}
    while set(stores) - set(ended):
        ended |= wait_for(adapter.get_store_event_fd(), adapter.pop_completed_store_tasks)
    assert not ended[stores[-1]].is_successful()

    service.start()
    while look_up(adapter, keys) != list(range(64)):
        pass
    assert load(adapter, keys, targets) == list(range(64))
    assert fills(targets) == list(range(64))


def test_a_service_that_is_away_is_a_miss_at_once_and_found_later(make: Make, service: Service) -> None:
    keys = [key(number) for number in range(4)]
    store(make(), keys, [object_of(number) for number in range(4)])
    service.end()
    adapter = make(retry_s=1000.0)
    assert look_up(adapter, keys) == []  # It takes a second to find out.
    for _ in range(1000):
        assert look_up(adapter, keys) == []
    status = adapter.report_status()
    assert not status["is_healthy"] and status["failed_calls"] == 1
    late = make(retry_s=1e-9)
    assert look_up(late, keys) == []
    service.start()
    while look_up(late, keys) != [0, 1, 2, 3]:
        pass


def test_nothing_is_left_of_an_adapter_that_was_closed(make: Make) -> None:
    def left() -> tuple[int, set[str]]:
        gc.collect()
        return len(os.listdir("/proc/self/fd")), {thread.name for thread in threading.enumerate()}

    def use() -> None:
        adapter = make()
        store(adapter, [key(1)], [object_of(1)])
        assert load(adapter, [key(1)], [object_of(0)]) == [0]
        adapter.close()
        late = adapter.submit_store_task([key(2)], [object_of(2)])  # By an engine that has not noticed.
        assert not adapter.pop_completed_store_tasks()[late].is_successful()

    before = left()
    use()
    descriptors, threads = left()
    assert threads == before[1]
    for _ in range(3):
        use()
    assert left() == (descriptors, threads)


def test_hashes_of_one_process_are_refused(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    adapter = make()
    seeded = key(0, chunk_hash=bytes(8))
    assert not store(adapter, [seeded], [object_of(1)]).is_successful()
    assert look_up(adapter, [seeded]) == []
    assert "--hash-algorithm blake3" in adapter.report_status()["error"]
    assert not adapter.report_status()["is_healthy"]
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    assert store(make(), [seeded], [object_of(1)]).is_successful()


@pytest.mark.parametrize(
    ("params", "said"),
    [({"dtype": ""}, "dtype must be given"), ({"adress": "x"}, "no such setting: adress"), ({"threads": 0}, "threads")],
)
def test_wrong_settings_are_said_at_once(make: Make, params: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make(**params)


def test_lmcaches_own_benchmark_reads_what_it_wrote(service: Service) -> None:
    adapter = {
        "type": "plugin",
        "module_path": "emberkv.adapters.lmcache",
        "class_name": "EmberL2Adapter",
        "adapter_params": {"address": service.address, "dtype": "bfloat16"},
    }
    command = [sys.executable, "-W", "ignore", "-m", "lmcache.cli.main", "bench", "l2"]
    command += ["--l2-adapter", json.dumps(adapter)]
    command += ["--num-keys", "16", "--data-size-kb", "64", "--rounds", "3", "--warmup-rounds", "1"]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "LMCACHE_TRACK_USAGE": "false"}, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("success_keys=16/16") == done.stdout.count("loaded=16/16") == 4, done.stdout
