"""A storage backend of SGLang's HiCache, loaded by `--hicache-storage-backend dynamic`.

SGLang calls from threads of its own, one to prefetch and one to back up, so calls are plain ones; what fails or comes
too late is not there. Pages go between the storage servers and the host pool, in place where a page of the pool is one
run of memory (`page_first` of MLA models), through a flat page otherwise.

The key of a page is SGLang's hash (SHA-256 over the tokens, no seed) with the name and form of its pool, and with the
rank where ranks hold other bytes. A namespace says the rest: model, revision, dtype, layout, tokens of a page.

Source: sglang 0.5.23, `HiCacheStorage`, v1 and v2. Does not know: which policies a model's pools have; it is told.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from sglang.srt.mem_cache.hicache_storage import (
    HiCacheStorage,
    HiCacheStorageConfig,
    HiCacheStorageExtraInfo,
    PoolHitPolicy,
    PoolName,
    PoolTransfer,
    PoolTransferResult,
)
from sglang.srt.runtime_context import get_model

from ..errors import InvalidNamespace
from ..namespace import Kind, Namespace, fields_bytes
from .door import KEPT, Door
from .settings import Settings, dtype_told

log = logging.getLogger(__name__)

RANKED_POOLS = frozenset({str(PoolName.MAMBA)})
"""Of models whose KV is the same on every rank, these are not."""

FORM = ("dtype", "layout", "storage_format_tag", "start_layer", "end_layer", "layer_num", "size_per_token")
"""What of a pool its pages depend on: layers of a draft model may be among its own, and stages of a pipeline be cut
elsewhere. A page of another form is another page, and not one that is there and cannot be read."""


class EmberHiCache(HiCacheStorage):
    """See the module. The settings are under "emberkv" in the extra configuration."""

    def __init__(self, storage_config: HiCacheStorageConfig, kwargs: Any = None) -> None:
        given = (storage_config.extra_config or {}).get("emberkv")
        if not isinstance(given, dict):
            raise InvalidNamespace(
                'the extra configuration of the storage backend needs "emberkv": {"address": "host:port", ...}'
            )
        given = dict(given)
        self._dtype = str(given.pop("dtype", ""))
        self._settings = Settings.read(given)
        self._config = storage_config
        self._door: Door | None = None
        self.registered_pools: dict[str, Any] = {}

    # --- pools -----------------------------------------------------------------------------------------------------

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        """The pool of the KV. From here on we know what a page is, and open the cache. Raises what `Door` does."""
        super().register_mem_pool_host(mem_pool_host)
        self.registered_pools[str(PoolName.KV)] = mem_pool_host
        if self._door is not None:
            self._door.close()
        dtype = self._dtype or kv_format(mem_pool_host)
        self._door = Door(self._settings, namespace_of(self._config, mem_pool_host, self._settings, dtype))

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        """The pool of what a model keeps beside its KV."""
        self.registered_pools[str(host_pool_name)] = host_pool

    # --- version 2: several pools ----------------------------------------------------------------------------------

    def batch_exists_v2(
        self,
        keys: list[str],
        pool_transfers: list[PoolTransfer] | None = None,
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> PoolTransferResult:
        """How much of a prefix is usable, over all pools. One round trip."""
        transfers = pool_transfers or []
        names = [self._name(PoolName.KV, key) for key in keys]
        for transfer in transfers:
            names += [self._name(transfer.name, key) for key in checked_keys(transfer, keys)]
        there = self._exist(names)
        kv, there = there[: len(keys)], there[len(keys) :]
        kv_pages = leading(kv)
        hits = {str(PoolName.KV): kv_pages} if kv_pages else {}
        restorable = set(range(1, kv_pages + 1))
        for transfer in transfers:
            count = len(checked_keys(transfer, keys))
            mine, there = there[:count], there[count:]
            if transfer.hit_policy == PoolHitPolicy.BLOCK_GROUPS:
                pages = grouped_pages(transfer, mine)
            else:
                usable = usable_prefixes(transfer, mine, kv_pages)
                restorable &= usable
                pages = max(usable, default=0)
            if pages:
                hits[transfer.name] = pages
        return PoolTransferResult(max(restorable, default=0), hits, sorted(restorable))

    def batch_get_v2(
        self, transfers: list[PoolTransfer], extra_info: HiCacheStorageExtraInfo | None = None
    ) -> dict[str, list[bool]]:
        """Fill pages of several pools."""
        return {each.name: self._get_pages(each.name, each.keys or [], each.host_indices) for each in transfers}

    def batch_set_v2(
        self, transfers: list[PoolTransfer], extra_info: HiCacheStorageExtraInfo | None = None
    ) -> dict[str, list[bool]]:
        """Keep pages of several pools."""
        return {each.name: self._set_pages(each.name, each.keys or [], each.host_indices) for each in transfers}

    # --- version 1: the KV, in place -------------------------------------------------------------------------------

    def batch_exists(self, keys: list[str], extra_info: HiCacheStorageExtraInfo | None = None) -> int:
        """How many pages there are, from the first on. They stay for as long as a lease lasts."""
        return leading(self._exist([self._name(PoolName.KV, key) for key in keys]))

    def batch_get_v1(
        self, keys: list[str], host_indices: torch.Tensor, extra_info: HiCacheStorageExtraInfo | None = None
    ) -> list[bool]:
        """Fill pages of the host pool."""
        return self._get_pages(PoolName.KV, keys, host_indices)

    def batch_set_v1(
        self, keys: list[str], host_indices: torch.Tensor, extra_info: HiCacheStorageExtraInfo | None = None
    ) -> list[bool]:
        """Keep pages of the host pool."""
        before = (extra_info.prefix_keys if extra_info is not None else None) or []
        return self._set_pages(PoolName.KV, keys, host_indices, before[-1] if before else None)

    # --- the first version: tensors --------------------------------------------------------------------------------

    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> torch.Tensor | None:
        """One page into a flat tensor, or None."""
        return self.batch_get([key], [target_location])[0]

    def batch_get(
        self, keys: list[str], target_locations: Any = None, target_sizes: Any = None
    ) -> list[torch.Tensor | None]:
        """Pages into flat tensors; None for one that is not there."""
        done = self._read([self._name(PoolName.KV, key) for key in keys], target_locations)
        return [target if good else None for target, good in zip(target_locations, done, strict=True)]

    def set(self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None) -> bool:
        """Keep one page."""
        return self.batch_set([key], [value])

    def batch_set(
        self, keys: list[str], values: Any = None, target_locations: Any = None, target_sizes: Any = None
    ) -> bool:
        """Keep pages. Whether all of them are kept."""
        return all(self._write([self._name(PoolName.KV, key) for key in keys], values))

    def exists(self, key: str) -> bool:
        """Whether a page is there."""
        return self._exist([self._name(PoolName.KV, key)])[0]

    def clear(self) -> None:
        """Nothing: the pages are other servers' too. `emberline kv drop` empties a namespace."""
        log.warning("the KV cache is shared, and was not cleared: see `emberline kv drop`")

    def close(self) -> None:
        """End it."""
        if self._door is not None:
            self._door.close()

    # --- pages -----------------------------------------------------------------------------------------------------

    def _get_pages(self, pool_name: Any, keys: Sequence[str], indices: torch.Tensor | None) -> list[bool]:
        pool = self._pool(pool_name, keys, indices)
        if pool is None or indices is None:
            return [False] * len(keys)
        places = [int(indices[order * page_tokens(pool)]) for order in range(len(keys))]
        in_place = [page_in_place(pool, place) for place in places]
        pages = [pool.get_dummy_flat_data_page() if page is None else page for page in in_place]
        done = self._read([self._name(pool_name, key) for key in keys], pages)
        for place, mine, page, good in zip(places, in_place, pages, done, strict=True):
            if good and mine is None:
                pool.set_from_flat_data_page(place, page)
        return done

    def _set_pages(
        self, pool_name: Any, keys: Sequence[str], indices: torch.Tensor | None, before: str | None = None
    ) -> list[bool]:
        pool = self._pool(pool_name, keys, indices)
        if pool is None or indices is None:
            return [False] * len(keys)
        places = [int(indices[order * page_tokens(pool)]) for order in range(len(keys))]
        in_place = [page_in_place(pool, place) for place in places]
        pages = [
            pool.get_data_page(place, flat=True) if page is None else page
            for place, page in zip(places, in_place, strict=True)
        ]
        names = [self._name(pool_name, key) for key in keys]
        return self._write(names, pages, None if before is None else self._name(pool_name, before))

    def _pool(self, name: Any, keys: Sequence[str], indices: torch.Tensor | None) -> Any:
        """None: the transfer is not one of a pool we know."""
        pool = self.registered_pools.get(str(name))
        if pool is None or indices is None or indices.numel() != len(keys) * page_tokens(pool):
            log.error("no transfer of %d pages of pool %s: it is not registered, or has other indices", len(keys), name)
            return None
        return pool

    def _read(self, names: Sequence[bytes], tensors: Sequence[torch.Tensor]) -> list[bool]:
        return self._opened().load(names, [bytes_of(tensor) for tensor in tensors])

    def _write(
        self, names: Sequence[bytes], tensors: Sequence[torch.Tensor], before: bytes | None = None
    ) -> list[bool]:
        states = self._opened().put(names, [bytes_of(tensor) for tensor in tensors], before)
        return [state in KEPT for state in states]

    def _exist(self, names: Sequence[bytes]) -> list[bool]:
        return [size is not None for size in self._opened().find(names)]

    def _name(self, pool_name: Any, key: str) -> bytes:
        """What our key is made of: pool, form, rank and hash."""
        pool = self.registered_pools.get(str(pool_name))
        form = [str(getattr(pool, field, "")) for field in FORM]
        rank = rank_of(self._config, str(pool_name))
        return fields_bytes(text.encode() for text in ("sglang", str(pool_name), *form, rank, key))

    def _opened(self) -> Door:
        assert self._door is not None, "SGLang registers its host pool before it asks for pages"
        return self._door


# --- which pages are usable ------------------------------------------------------------------------------------------


def leading(there: Sequence[bool]) -> int:
    """How many are there, from the first on."""
    return next((index for index, is_there in enumerate(there) if not is_there), len(there))


def checked_keys(transfer: PoolTransfer, keys: list[str]) -> list[str]:
    """The pages of a pool that decide about a prefix: for groups their own keys, else those of the prefix."""
    return (transfer.keys or []) if transfer.hit_policy == PoolHitPolicy.BLOCK_GROUPS else keys


def usable_prefixes(transfer: PoolTransfer, there: Sequence[bool], kv_pages: int) -> set[int]:
    """The lengths of prefix that a pool can restore."""
    if transfer.hit_policy == PoolHitPolicy.ALL_PAGES:
        return set(range(1, min(leading(there), kv_pages) + 1))
    if transfer.hit_policy == PoolHitPolicy.TRAILING_PAGES:
        last = max(1, len(transfer.keys or ()))
        return {end for end in range(1, kv_pages + 1) if all(there[max(0, end - last) : end])}
    raise ValueError(f"pool {transfer.name} has the unknown policy {transfer.hit_policy}")


def grouped_pages(transfer: PoolTransfer, there: Sequence[bool]) -> int:
    """How many pages of the prefix the whole groups from the start stand for. It never shortens the KV's prefix."""
    if transfer.group_pages <= 0 or transfer.block_pages <= 0:
        raise ValueError(
            f"pool {transfer.name} has groups of {transfer.group_pages} and blocks of {transfer.block_pages}"
        )
    return int(leading(there) // transfer.group_pages * transfer.block_pages)


# --- what a page is --------------------------------------------------------------------------------------------------


def page_tokens(pool: Any) -> int:
    """Indices of a page."""
    return int(pool.page_size)


def page_in_place(pool: Any, place: int) -> torch.Tensor | None:
    """A page of a host pool, if it is one run of the pool's own memory: None where it would be a copy."""
    whole = getattr(pool, "kv_buffer", None)
    if not isinstance(whole, torch.Tensor):
        return None
    page: torch.Tensor = pool.get_data_page(place, flat=False)
    is_own = page.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    return page if is_own and page.is_contiguous() else None


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor of the host."""
    flat: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def rank_of(config: HiCacheStorageConfig, pool_name: str) -> str:
    """What tells a rank's pages from another's; empty where all ranks have the same."""
    parts = []
    if config.pp_size > 1:
        parts.append(f"pp{config.pp_rank}/{config.pp_size}")
    if config.attn_cp_size > 1:
        parts.append(f"cp{config.attn_cp_rank}/{config.attn_cp_size}")
    if config.dcp_size > 1:
        parts.append(f"dcp{config.dcp_rank}/{config.dcp_size}")
    if not config.is_mla_model or pool_name in RANKED_POOLS:
        parts.append(f"tp{config.tp_rank}/{config.tp_size}")
    return " ".join(parts)


def kv_format(pool: Any) -> str:
    """What SGLang's --kv-cache-dtype says of a pool whose dtype does not: it keeps all FP8 and FP4 as bytes. Empty: the
    pool's dtype is all there is to say, or SGLang does not tell."""
    if pool.dtype != torch.uint8:
        return ""
    try:
        asked = str(get_model().kv_cache_dtype)
    except ValueError:  # Nobody has made its configuration known in this process.
        return ""
    asked = "fp8_e4m3" if asked == "auto" else asked  # The only one of those that a checkpoint may ask for.
    if torch.version.hip is None or not asked.startswith("fp8"):
        return asked
    from sglang.srt.mem_cache.kv_cache_dtype import fp8_dtype

    return str(fp8_dtype).removeprefix("torch.")  # AMD's own, whichever was asked for.


def namespace_of(config: HiCacheStorageConfig, pool: Any, settings: Settings, dtype: str) -> Namespace:
    """Whose pages are interchangeable; `dtype` is what is known of it beside the pool's. Raises InvalidNamespace."""
    form = f" {pool.storage_format_tag}" if getattr(pool, "storage_format_tag", None) else ""
    return Namespace(
        model=config.model_name or "", revision=settings.revision,
        dtype=dtype_told(str(pool.dtype).removeprefix("torch."), dtype),
        layout=f"sglang-{pool.layout}{form}", page_tokens=page_tokens(pool), kinds=(Kind("kv"),),
    )  # fmt: skip
