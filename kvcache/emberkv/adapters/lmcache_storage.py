"""LMCache's storage plug-in, for engines that have LMCache in their own process.

    storage_plugins: ["emberkv"]
    extra_config:
      storage_plugin.emberkv.module_path: emberkv.adapters.lmcache_storage
      storage_plugin.emberkv.class_name: EmberStorage
      emberkv: {address: "127.0.0.1:7400"}

LMCache asks and loads in threads of the engine's worker, so those calls are plain ones with a deadline; stores, and
everything that its event loop asks for, are done by threads of ours. Chunks are read into memory of its CPU backend.

The key of a chunk is LMCache's: its hash, rank, number of ranks and tags. Where all ranks have the same KV, LMCache
itself stores the first one's and says so in the key. A namespace says the rest: model, revision, dtype, shape, tokens.

Source: lmcache 0.5.6, `StoragePluginInterface`. Does not know: layers, one by one.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from lmcache.v1.memory_management import MemoryFormat
from lmcache.v1.storage_backend.abstract_backend import StoragePluginInterface

from ..errors import InvalidNamespace, SeededKeys
from ..namespace import Kind, Namespace, fields_bytes
from .door import KEPT, Door
from .settings import Settings, dtype_told
from .workers import Workers

T = TypeVar("T")

log = logging.getLogger(__name__)

STEADY_HASHES = ("sha256", "sha256_cbor", "sha256_cbor_64bit")
"""The same in every process, whatever its seed."""


class EmberStorage(StoragePluginInterface):
    """See the module. The settings are under "emberkv" in LMCache's extra_config: those of `Settings`, and dtype.
    Raises what `Settings` and `Door` do; LMCache writes that to its log and goes on without us."""

    def __init__(
        self, dst_device: str = "cpu", config: Any = None, metadata: Any = None, local_cpu_backend: Any = None,
        loop: Any = None,
    ) -> None:  # fmt: skip
        super().__init__(dst_device, config, metadata, local_cpu_backend, loop)
        refuse(config, local_cpu_backend)
        self._metadata, self._memory = metadata, local_cpu_backend
        given = dict((config.extra_config or {}).get("emberkv") or {})
        dtype = str(given.pop("dtype", ""))
        self._settings = Settings.read(given)
        self._format = MemoryFormat.KV_MLA_FMT if metadata.use_mla else MemoryFormat.KV_2LTD
        self._door = Door(self._settings, namespace_of(metadata, self._settings, dtype))
        self._workers = Workers(self._settings, "storage")
        self._lock = threading.Lock()
        self._storing: set[Any] = set()

    # --- what there is ---------------------------------------------------------------------------------------------

    def contains(self, key: Any, pin: bool = False) -> bool:
        """Whether a chunk is there. It stays for as long as a lease lasts, pinned or not."""
        return self.batched_contains([key]) == 1

    def batched_contains(self, keys: list[Any], pin: bool = False) -> int:
        """How many chunks are there, from the first on. One round trip."""
        sizes = self._door.find([name_of(key) for key in keys])
        return next((index for index, size in enumerate(sizes) if size is None), len(sizes))

    async def batched_async_contains(self, lookup_id: str, keys: list[Any], pin: bool = False) -> int:
        """The same from LMCache's event loop, which goes on meanwhile."""
        return await self._in_a_thread(lambda: self.batched_contains(keys), 0, lambda _: None)

    def pin(self, key: Any) -> bool:
        """A lease is what keeps a chunk."""
        return self.contains(key)

    def unpin(self, key: Any) -> bool:
        """It will not be loaded soon."""
        self._door.forget([name_of(key)])
        return True

    def remove(self, key: Any, force: bool = True) -> bool:
        """Take a chunk out, with those after it."""
        return self._door.remove([name_of(key)]) == 1

    # --- loads -----------------------------------------------------------------------------------------------------

    def get_blocking(self, key: Any) -> Any:
        """A chunk in memory of the CPU backend, or None."""
        return self.batched_get_blocking([key])[0]

    def batched_get_blocking(self, keys: list[Any]) -> list[Any]:
        """Chunks; None for one that is not there, or that there is no memory for."""
        names = [name_of(key) for key in keys]
        objects: list[Any] = [None if size is None else self._room(size) for size in self._door.find(names)]
        wanted = [index for index, each in enumerate(objects) if each is not None]
        done = self._door.load([names[index] for index in wanted], [objects[index].byte_array for index in wanted])
        for index, good in zip(wanted, done, strict=True):
            if not good:
                objects[index].ref_count_down()
                objects[index] = None
        return objects

    async def batched_get_non_blocking(self, lookup_id: str, keys: list[Any], transfer_spec: Any = None) -> list[Any]:
        """The chunks that are there from the first on, without stopping LMCache's event loop."""
        nothing: list[Any] = []
        objects = await self._in_a_thread(lambda: self.batched_get_blocking(keys), nothing, let_go)
        whole = next((index for index, each in enumerate(objects) if each is None), len(objects))
        let_go(objects[whole:])
        return objects[:whole]

    def get_allocator_backend(self) -> Any:
        """Whose memory we read into and write out of."""
        return self._memory

    # --- stores ----------------------------------------------------------------------------------------------------

    def batched_submit_put_task(
        self, keys: Sequence[Any], objs: list[Any], transfer_spec: Any = None,
        on_complete_callback: Callable[[Any], None] | None = None,
    ) -> None:  # fmt: skip
        """Begin to keep chunks, each after the one before it."""
        with self._lock:
            taken = [(key, each) for key, each in zip(keys, objs, strict=True) if key not in self._storing]
            self._storing.update(key for key, _ in taken)
        for _, each in taken:
            each.ref_count_up()
        if taken:
            self._workers.store(
                lambda: self._store(taken), [], lambda kept: self._end(taken, kept, on_complete_callback)
            )

    def exists_in_put_tasks(self, key: Any) -> bool:
        """Whether a chunk is being stored."""
        with self._lock:
            return key in self._storing

    def close(self) -> None:
        """End it."""
        self._workers.close()
        self._door.close()

    async def _in_a_thread(self, work: Callable[[], T], otherwise: T, unwanted: Callable[[T], None]) -> T:
        """What `work` makes of it; `unwanted` is given that if LMCache has cancelled us by then."""
        loop = asyncio.get_running_loop()
        waiting: asyncio.Future[T] = loop.create_future()

        def take(result: T) -> None:
            unwanted(result) if waiting.cancelled() else waiting.set_result(result)

        def tell(result: T) -> None:
            try:
                loop.call_soon_threadsafe(take, result)
            except RuntimeError:  # The loop has ended.
                unwanted(result)

        self._workers.load(work, otherwise, tell)
        try:
            return await waiting
        except asyncio.CancelledError:
            if not waiting.cancelled():
                unwanted(waiting.result())
            raise

    def _store(self, chunks: list[tuple[Any, Any]]) -> list[Any]:
        states = self._door.put([name_of(key) for key, _ in chunks], [each.byte_array for _, each in chunks])
        return [key for (key, _), state in zip(chunks, states, strict=True) if state in KEPT]

    def _end(self, chunks: list[tuple[Any, Any]], kept: list[Any], told: Callable[[Any], None] | None) -> None:
        with self._lock:
            self._storing.difference_update(key for key, _ in chunks)
        for _, each in chunks:
            each.ref_count_down()
        if told is None:
            return
        for key in kept:
            try:
                told(key)
            except Exception:  # LMCache's, and said to be caught.
                log.exception("LMCache failed to note that a chunk is stored")

    def _room(self, size: int) -> Any:
        """Memory for a chunk of so many bytes, the last of a prompt may have fewer tokens. None: there is none."""
        whole = sum(
            shape.numel() * dtype.itemsize
            for shape, dtype in zip(self._metadata.get_shapes(), self._metadata.get_dtypes(), strict=True)
        )
        tokens, rest = divmod(size * self._metadata.chunk_size, whole)
        if rest or not 0 < tokens <= self._metadata.chunk_size:
            return None
        shapes, dtypes = self._metadata.get_shapes(tokens), self._metadata.get_dtypes()
        return self._memory.allocate(shapes, dtypes, self._format, busy_loop=False)


def let_go(objects: Sequence[Any]) -> None:
    """Memory of the CPU backend, back to it."""
    for each in objects:
        if each is not None:
            each.ref_count_down()


def name_of(key: Any) -> bytes:
    """What LMCache's key says about a chunk beside its model and dtype."""
    numbers = (key.world_size, key.worker_id, key.chunk_hash)
    tags = [part for pair in key.tags or () for part in pair]
    return fields_bytes(str(each).encode() for each in ("lmcache storage", *numbers, *tags))


def namespace_of(metadata: Any, settings: Settings, dtype: str) -> Namespace:
    """Whose chunks are interchangeable; `dtype` is what is given of it. Raises InvalidNamespace."""
    shape = "x".join(str(each) for each in metadata.kv_shape)
    return Namespace(
        model=metadata.model_name, revision=settings.revision,
        dtype=dtype_told(str(metadata.kv_dtype).removeprefix("torch."), dtype),
        layout=f"lmcache-{'mla' if metadata.use_mla else 'kv'}-{shape}", page_tokens=metadata.chunk_size,
        kinds=(Kind("kv"),),
    )  # fmt: skip


def refuse(config: Any, local_cpu_backend: Any) -> None:
    """Raises SeededKeys, InvalidNamespace: not with this configuration."""
    name = config.pre_caching_hash_algorithm
    if name not in STEADY_HASHES and not os.environ.get("PYTHONHASHSEED", "random").isdigit():
        raise SeededKeys(
            f"LMCache hashes chunks with {name!r}, whose seed is another one in each process: set "
            "pre_caching_hash_algorithm: sha256_cbor (or PYTHONHASHSEED to one number everywhere)"
        )
    if config.use_layerwise:
        raise InvalidNamespace("use_layerwise: chunks are kept whole; set it to false")
    if local_cpu_backend is None:
        raise InvalidNamespace(
            "no CPU backend to read into: set max_local_cpu_size above 0, and enable_scheduler_bypass_lookup to false"
        )
