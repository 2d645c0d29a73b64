"""SGLang's storage backend: made by SGLang's factory from `dynamic`, with and without its failure injector.

Host pools of SGLang need a GPU's libraries to be imported; those here have the same shapes. Run: make test-adapters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from emberkv import InvalidNamespace
from sglang.srt.environ import envs
from sglang.srt.mem_cache.hicache_storage import (
    HiCacheStorageConfig,
    HiCacheStorageExtraInfo,
    HiCacheStorageFailureInjector,
    PoolHitPolicy,
    PoolName,
    PoolTransfer,
)
from sglang.srt.mem_cache.storage.backend_factory import StorageBackendFactory

from tests.adapters.conftest import Service, flush

PAGE = 16
LAYERS = 3
WIDTH = 64

Make = Callable[..., Any]


class HostPool:
    """Of an MLA model, as SGLang's MLATokenToKVPoolHost lays it out."""

    def __init__(self, layout: str = "page_first", dtype: torch.dtype = torch.bfloat16, page_size: int = PAGE) -> None:
        self.layout, self.dtype, self.page_size = layout, dtype, page_size
        tokens = 64 * page_size
        by_page = layout == "page_first"
        shape = (tokens, LAYERS, 1, WIDTH) if by_page else (LAYERS, tokens, 1, WIDTH)
        self.kv_buffer = torch.zeros(shape, dtype=dtype)

    def get_data_page(self, index: int, flat: bool = True) -> torch.Tensor:
        rows = slice(index, index + self.page_size)
        page = self.kv_buffer[rows] if self.layout == "page_first" else self.kv_buffer[:, rows]
        return page.flatten() if flat else page

    def get_dummy_flat_data_page(self) -> torch.Tensor:
        return torch.zeros(LAYERS * self.page_size * WIDTH, dtype=self.dtype)

    def set_from_flat_data_page(self, index: int, data_page: torch.Tensor) -> None:
        page = self.get_data_page(index, flat=False)
        page[:] = data_page.reshape(page.shape)

    def fill(self, pages: list[int], values: list[float]) -> torch.Tensor:
        """Indices of the tokens of `pages`, which hold `values` now."""
        for page, value in zip(pages, values, strict=True):
            self.get_data_page(page * self.page_size, flat=False)[:] = value
        return self.indices(pages)

    def indices(self, pages: list[int]) -> torch.Tensor:
        return torch.cat([torch.arange(page * self.page_size, (page + 1) * self.page_size) for page in pages])

    def values(self, pages: list[int]) -> list[float]:
        found = [self.get_data_page(page * self.page_size) for page in pages]
        assert all(bool((page == page[0]).all()) for page in found)
        return [float(page[0]) for page in found]


def hashes(prompt: int, count: int) -> list[str]:
    """As SGLang chains them."""
    keys: list[str] = []
    for page in range(count):
        before = bytes.fromhex(keys[-1]) if keys else b""
        keys.append(hashlib.sha256(before + f"{prompt} {page}".encode()).hexdigest())
    return keys


@pytest.fixture
def make(service: Service) -> Iterator[Make]:
    made = []

    def backend(
        pool: HostPool | None = None,
        *,
        mla: bool = True,
        tp: tuple[int, int] = (0, 1),
        model: str = "deepseek-ai/DeepSeek-V3",
        **settings: Any,
    ) -> Any:
        config = HiCacheStorageConfig(
            tp_rank=tp[0], tp_size=tp[1], pp_rank=0, pp_size=1, attn_cp_rank=0, attn_cp_size=1, is_mla_model=mla,
            enable_storage_metrics=False, is_page_first_layout=True, model_name=model,
            extra_config={
                "backend_name": "emberkv",
                "module_path": "emberkv.adapters.sglang",
                "class_name": "EmberHiCache",
                "interface_v1": 1,
                "emberkv": {"address": service.address, "timeout_s": 1.0, **settings},
            },
        )  # fmt: skip
        pool = HostPool() if pool is None else pool
        storage = StorageBackendFactory.create_backend("dynamic", config, pool)
        storage.register_mem_pool_host(pool)
        storage.on_host_pools_registered()
        made.append(storage)
        return storage

    yield backend
    for each in made:
        each.close()


@pytest.mark.parametrize("layout", ["page_first", "layer_first"])
def test_what_one_server_stored_another_one_reads(make: Make, layout: str) -> None:
    mine, theirs = HostPool(layout), HostPool(layout)
    one, other = make(mine), make(theirs)
    keys = hashes(1, 8)
    assert one.batch_set_v1(keys[:6], mine.fill([0, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6])) == [True] * 6
    tail = HiCacheStorageExtraInfo(prefix_keys=keys[:6])
    assert one.batch_set_v1(keys[6:], mine.fill([6, 7], [7, 8]), tail) == [True] * 2
    assert other.batch_exists([*keys, *hashes(2, 1)]) == 8
    assert other.batch_exists(keys[3:], HiCacheStorageExtraInfo(prefix_keys=keys[:3])) == 5
    assert other.batch_exists(hashes(2, 3)) == 0
    assert other.exists(keys[4]) and not other.exists(hashes(2, 1)[0])
    where = [20, 11, 12, 13, 14, 15, 16, 17]
    assert other.batch_get_v1(keys, theirs.indices(where)) == [True] * 8
    assert theirs.values(where) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert theirs.values([10, 18, 19, 21]) == [0, 0, 0, 0]
    assert other.batch_get_v1([hashes(2, 1)[0], keys[0]], theirs.indices([30, 31])) == [False, True]


def test_the_calls_with_tensors(make: Make) -> None:
    storage, pool = make(), HostPool()
    keys = hashes(1, 3)
    pool.fill([0, 1, 2], [1, 2, 3])
    assert storage.batch_set(keys, [pool.get_data_page(page * PAGE) for page in range(3)])
    assert storage.set(keys[0], pool.get_data_page(0))
    targets = [pool.get_dummy_flat_data_page() for _ in range(4)]
    found = storage.batch_get([*keys, "00"], targets)
    assert [None if page is None else float(page[7]) for page in found] == [1, 2, 3, None]
    assert storage.get("00", targets[0]) is None
    storage.clear()  # It is not ours alone.
    assert storage.batch_exists(keys) == 3


def test_ranks_share_what_is_the_same_and_only_that(make: Make) -> None:
    keys = hashes(1, 2)
    pool = HostPool()
    assert make(pool, tp=(0, 2)).batch_set_v1(keys, pool.fill([0, 1], [1, 2])) == [True, True]
    assert make(tp=(3, 4)).batch_exists(keys) == 2  # MLA: every rank of any degree has the same.
    assert make(mla=False, tp=(0, 2)).batch_set_v1(keys, pool.indices([0, 1])) == [True, True]
    assert make(mla=False, tp=(1, 2)).batch_exists(keys) == 0
    assert make(mla=False, tp=(0, 2)).batch_exists(keys) == 2
    for other in (HostPool("layer_first"), HostPool(dtype=torch.float16), HostPool(page_size=32)):
        assert make(other).batch_exists(keys) == 0
    for settings in ({"revision": "r2"}, {"model": "other"}, {"salt": "s"}, {"tenant": "other"}):
        assert make(**settings).batch_exists(keys) == 0


def test_formats_that_sglang_keeps_as_bytes_are_not_mixed_up(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    keys, pool = hashes(1, 1), HostPool(dtype=torch.uint8)  # As for any --kv-cache-dtype fp8_...: of one size.
    with pytest.raises(InvalidNamespace, match='set "dtype"'):
        make(pool)
    for asked in ("fp8_e4m3", "fp8_e5m2"):
        monkeypatch.setattr(
            "emberkv.adapters.sglang.get_model", lambda asked=asked: SimpleNamespace(kv_cache_dtype=asked)
        )
        storage = make(pool)
        assert storage.batch_exists(keys) == 0
        assert storage.batch_set_v1(keys, pool.fill([0], [1])) == [True]
    monkeypatch.setattr("emberkv.adapters.sglang.get_model", lambda: SimpleNamespace(kv_cache_dtype="auto"))
    assert make(pool).batch_exists(keys) == 1
    assert make(pool, dtype="fp8_e5m2").batch_exists(keys) == 1
    assert make(pool, dtype="nvfp4").batch_exists(keys) == 0


@pytest.mark.parametrize("other", [{"layer_num": LAYERS + 1}, {"start_layer": 1}, {"size_per_token": 7}])
def test_pages_of_other_layers_are_others(make: Make, other: dict[str, int]) -> None:
    keys, mine, theirs = hashes(1, 1), HostPool(), HostPool()
    vars(mine).update({"layer_num": LAYERS, "start_layer": 0, "size_per_token": 6})
    vars(theirs).update({**vars(mine), "kv_buffer": theirs.kv_buffer, **other})
    assert make(mine).batch_set_v1(keys, mine.fill([0], [1])) == [True]
    storage = make(theirs)
    assert storage.batch_exists(keys) == 0
    assert storage.batch_set_v1(keys, theirs.fill([0], [2])) == [True]
    assert storage.batch_get_v1(keys, theirs.indices([1])) == [True] and theirs.values([1]) == [2]


def transfer(name: PoolName, keys: list[str] | None, pool: HostPool, pages: list[int], **more: Any) -> PoolTransfer:
    return PoolTransfer(name=name, keys=keys, host_indices=pool.indices(pages) if pages else None, **more)


def test_several_pools(make: Make) -> None:
    kv, indexer, window = HostPool(), HostPool(dtype=torch.uint8), HostPool(page_size=1)
    storage = make(kv)
    storage.register_mem_host_pool_v2(indexer, PoolName.INDEXER)
    storage.register_mem_host_pool_v2(window, PoolName.SWA)
    keys = hashes(1, 6)
    assert storage.batch_set_v1(keys, kv.fill(list(range(6)), [1, 2, 3, 4, 5, 6])) == [True] * 6
    indexer.fill(list(range(5)), [11, 12, 13, 14, 15])
    window.fill([0, 1], [21, 22])
    put = [
        transfer(PoolName.INDEXER, keys[:5], indexer, list(range(5))),
        transfer(PoolName.SWA, keys[2:4], window, [0, 1]),
    ]
    assert storage.batch_set_v2(put) == {PoolName.INDEXER: [True] * 5, PoolName.SWA: [True] * 2}

    ask = [
        transfer(PoolName.INDEXER, None, indexer, []),
        transfer(PoolName.SWA, keys[4:], window, [], hit_policy=PoolHitPolicy.TRAILING_PAGES),
    ]
    assert storage.batch_exists_v2(keys).kv_hit_pages == 6
    assert storage.batch_exists_v2(keys, ask[:1]).kv_hit_pages == 5
    found = storage.batch_exists_v2(keys, ask)
    assert (found.kv_hit_pages, found.restorable_prefix_pages) == (4, [4])  # Where the window's last two pages are.
    assert found.extra_pool_hit_pages == {PoolName.KV: 6, PoolName.INDEXER: 5, PoolName.SWA: 4}

    indexer.fill(list(range(5)), [0] * 5)
    get = [
        transfer(PoolName.INDEXER, keys[:6], indexer, [9, 8, 7, 6, 5, 4]),
        transfer(PoolName.SWA, keys[3:4], window, [5]),
    ]
    assert storage.batch_get_v2(get) == {PoolName.INDEXER: [True] * 5 + [False], PoolName.SWA: [True]}
    assert indexer.values([9, 8, 7, 6, 5]) == [11, 12, 13, 14, 15] and window.values([5]) == [22]
    wrong = transfer(PoolName.INDEXER, keys[:2], indexer, [1])
    assert storage.batch_get_v2([wrong, transfer(PoolName.MAMBA, keys[:1], window, [1])]) == {
        PoolName.INDEXER: [False] * 2, PoolName.MAMBA: [False],
    }  # fmt: skip


def test_block_groups_say_what_they_cover_and_shorten_nothing(make: Make) -> None:
    kv, blocks = HostPool(), HostPool(dtype=torch.uint8)
    storage = make(kv)
    storage.register_mem_host_pool_v2(blocks, PoolName.DEEPSEEK_V4_C4)
    keys, groups = hashes(1, 8), hashes(2, 4)
    storage.batch_set_v1(keys, kv.fill(list(range(8)), [1] * 8))
    storage.batch_set_v2([transfer(PoolName.DEEPSEEK_V4_C4, groups[:3], blocks, [0, 1, 2])])
    ask = transfer(
        PoolName.DEEPSEEK_V4_C4, groups, blocks, [], hit_policy=PoolHitPolicy.BLOCK_GROUPS, block_pages=4, group_pages=2
    )
    found = storage.batch_exists_v2(keys, [ask])
    assert found.kv_hit_pages == 8
    assert found.extra_pool_hit_pages == {PoolName.KV: 8, PoolName.DEEPSEEK_V4_C4: 4}  # One group of two is whole.


def test_a_service_that_does_not_answer_is_a_miss_in_time(make: Make, service: Service) -> None:
    pool = HostPool()
    storage = make(pool, retry_s=1e-9)
    keys = hashes(1, 3)
    assert storage.batch_set_v1(keys, pool.fill([0, 1, 2], [1, 2, 3])) == [True] * 3
    service.freeze()
    assert storage.batch_exists(keys) == 0
    assert storage.batch_get_v1(keys, pool.indices([3, 4, 5])) == [False] * 3
    assert storage.batch_set_v1(hashes(2, 1), pool.indices([0])) == [False]
    assert storage.batch_exists_v2(keys).kv_hit_pages == 0
    service.thaw()
    while storage.batch_exists(keys) != 3:
        pass
    assert storage.batch_get_v1(keys, pool.indices([3, 4, 5])) == [True] * 3
    assert pool.values([3, 4, 5]) == [1, 2, 3]


def test_a_service_killed_between_two_calls_is_a_miss_until_it_is_back(make: Make, service: Service) -> None:
    pool = HostPool()
    storage = make(pool, retry_s=1e-9)
    keys = hashes(1, 3)
    assert storage.batch_set_v1(keys, pool.fill([0, 1, 2], [1, 2, 3])) == [True] * 3
    flush(storage._door)
    assert storage.batch_exists(keys) == 3
    service.kill()
    pool.fill([3, 4, 5], [0, 0, 0])
    done = storage.batch_get_v1(keys, pool.indices([3, 4, 5]))  # What was found may still be read from the store.
    assert pool.values([3, 4, 5]) == [value if good else 0 for value, good in zip([1, 2, 3], done, strict=True)]
    assert storage.batch_exists(keys) == 0
    assert storage.batch_set_v1(hashes(2, 1), pool.indices([0])) == [False]
    service.start()
    while storage.batch_exists(keys) != 3:
        pass
    assert storage.batch_get_v1(keys, pool.indices([3, 4, 5])) == [True] * 3
    assert pool.values([3, 4, 5]) == [1, 2, 3]


def test_with_sglangs_failure_injector_no_page_is_wrong(make: Make) -> None:
    pool = HostPool()
    with envs.SGLANG_TEST_HICACHE_BACKEND_RANDOM_FAILURE.override(0.3):
        storage = make(pool)
    assert isinstance(storage, HiCacheStorageFailureInjector)
    right = 0
    for prompt in range(40):
        keys = hashes(prompt, 4)
        storage.batch_set_v1(keys, pool.fill([0, 1, 2, 3], [prompt] * 4))
        there = storage.batch_exists(keys)
        pool.fill([4, 5, 6, 7], [99] * 4)
        done = storage.batch_get_v1(keys[:there], pool.indices([4, 5, 6, 7][:there])) if there else []
        assert pool.values([4 + page for page, good in enumerate(done) if good]) == [prompt] * sum(done)
        right += sum(done)
    assert right > 0


def test_settings_are_asked_for(service: Service) -> None:
    config = HiCacheStorageConfig(
        tp_rank=0, tp_size=1, pp_rank=0, pp_size=1, attn_cp_rank=0, attn_cp_size=1, is_mla_model=True,
        enable_storage_metrics=False, is_page_first_layout=True, model_name="m",
        extra_config={"backend_name": "e", "module_path": "emberkv.adapters.sglang", "class_name": "EmberHiCache"},
    )  # fmt: skip
    with pytest.raises(InvalidNamespace, match='needs "emberkv"'):
        StorageBackendFactory.create_backend("dynamic", config, HostPool())
