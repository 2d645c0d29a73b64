"""A secondary tier of vLLM's offloading connector, over its CPU tier.

    "secondary_tiers": [{"type": "EmberTier", "module_path": "emberkv.adapters.vllm", "address": "127.0.0.1:7400", ...}]

vLLM calls a tier in its scheduler: nothing here waits. A look-up is answered RETRY, done by a thread, and answered HIT
or MISS in a later step; stores and loads go straight between the CPU tier's memory and the storage servers. A load that
failed is a miss for the requests that waited for it.

The key of a chunk is vLLM's block hash and group. A namespace says the rest: model, revision, dtype, and how the bytes
of a chunk lie, with the parallelism where they depend on it. The chunks that a request stores are a chain that goes on
from those it found, so that the last goes first when room is needed.

Source: vllm 0.32.0 and 0.33.0, `SecondaryTierManager`. Does not know: GPUs.
"""

from __future__ import annotations

import hashlib
import json
import os
import queue
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Future, wait
from typing import Any, ClassVar

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.canonical_mapping import canonical_format_id
from vllm.v1.core import kv_cache_utils
from vllm.v1.kv_offload.base import (
    Locality,
    LookupResult,
    Medium,
    RequestOffloadingContext,
    ScheduleEndContext,
    get_offload_group_idx,
)
from vllm.v1.kv_offload.tiering.async_lookup import AsyncLookupManager
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager, TransferJob

from ..errors import SeededKeys
from ..namespace import Kind, Namespace, fields_bytes
from .door import KEPT, Door
from .settings import Settings
from .workers import Workers


class EmberTier(SecondaryTierManager):
    """See the module. `settings`: the fields of `Settings`."""

    medium: ClassVar[Medium] = Medium.STORAGE

    def __init__(
        self, offloading_spec: Any, primary_kv_view: memoryview, tier_type: str, backpressure_detector: Any = None,
        locality: str | None = None, **settings: Any,
    ) -> None:  # fmt: skip
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        refuse_seeded()
        self.locality = Locality(locality) if locality is not None else None
        self._settings = Settings.read(settings)
        self._memory = primary_kv_view.cast("B")
        self._door = Door(self._settings, namespace_of(offloading_spec, self._settings, self.block_size_bytes))
        self._workers = Workers(self._settings, "tier")
        self._under_way: set[Future[None]] = set()
        self._finished: queue.SimpleQueue[tuple[JobResult, list[Any]]] = queue.SimpleQueue()
        self._last: dict[str, dict[int, bytes]] = {}
        """Request -> group -> the chunk that was stored last. The scheduler's."""
        self._lookups = Lookups(self, tier_type)

    # --- the scheduler's calls -------------------------------------------------------------------------------------

    def on_new_request(self, req_context: Any) -> RequestOffloadingContext:
        """Offload what is computed. Raises SeededKeys: vLLM chooses its seed after it made us."""
        refuse_seeded()
        return RequestOffloadingContext()

    def lookup(self, key: Any, req_context: Any) -> LookupResult:
        """RETRY at first, and what was found in a later step."""
        found = self._lookups.lookup(key, req_context)
        if found is None:
            return LookupResult.RETRY
        return LookupResult.HIT if found else LookupResult.MISS

    def submit_store(self, job_metadata: TransferJob) -> None:
        """Begin to keep chunks."""
        request = job_metadata.req_context
        chains: dict[int, list[tuple[int, bytes, memoryview]]] = {}
        for order, (key, chunk) in enumerate(zip(job_metadata.keys, job_metadata.chunk_ids, strict=True)):
            position = request.get_offload_key_position(key)
            entry = (order if position is None else position, bytes(key), self._chunk(chunk))
            chains.setdefault(get_offload_group_idx(key), []).append(entry)
        work = []
        last = self._last.setdefault(request.req_id, {})
        for group, chain in chains.items():
            chain.sort(key=lambda entry: entry[0])
            parent = last.get(group) or chunk_before(request, group, chain[0][0])
            last[group] = chain[-1][1]
            work.append((parent, [key for _, key, _ in chain], [buffer for _, _, buffer in chain]))
        self._begin(self._workers.store, job_metadata, lambda: [good for chain in work for good in self._store(*chain)])

    def submit_load(self, job_metadata: TransferJob) -> None:
        """Begin to fill chunks of the CPU tier."""
        keys = [bytes(key) for key in job_metadata.keys]
        buffers = [self._chunk(chunk) for chunk in job_metadata.chunk_ids]
        self._begin(self._workers.load, job_metadata, lambda: self._load(keys, buffers))

    def get_finished_jobs(self) -> Iterable[JobResult]:
        """Those that ended since the last call."""
        results: list[JobResult] = []
        while True:
            try:
                result, failed = self._finished.get_nowait()
            except queue.Empty:
                return results
            self._lookups.mark_miss(failed)
            results.append(result)

    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        """The look-ups of a step go out together."""
        self._lookups.flush()

    def on_request_finished(self, req_context: Any) -> None:
        """Forget what it looked up."""
        self._lookups.cleanup(req_context.req_id)
        self._last.pop(req_context.req_id, None)

    def drain_jobs(self) -> None:
        """Every job has ended when this returns: nobody touches the CPU tier's memory."""
        wait(list(self._under_way))

    def shutdown(self) -> None:
        """End it, jobs first."""
        self._lookups.shutdown()
        self._workers.close()
        self._door.close()
        self._memory.release()

    # --- in our threads --------------------------------------------------------------------------------------------

    def find(self, keys: Sequence[Any]) -> list[bool]:
        """Which chunks there are. They stay for as long as a lease lasts."""
        return [size == self.block_size_bytes for size in self._door.find([name_of(bytes(key)) for key in keys])]

    def _store(self, parent: bytes | None, keys: Sequence[bytes], buffers: Sequence[memoryview]) -> list[bool]:
        before = None if parent is None else name_of(parent)
        return [state in KEPT for state in self._door.put([name_of(key) for key in keys], buffers, before)]

    def _load(self, keys: Sequence[bytes], buffers: Sequence[memoryview]) -> list[bool]:
        return self._door.load([name_of(key) for key in keys], buffers)

    def _begin(self, submit: Callable[..., Future[None]], job: TransferJob, work: Callable[[], list[bool]]) -> None:
        began_s = time.monotonic()

        def end(done: list[bool]) -> None:
            self._finished.put(self._ended(job, done, time.monotonic() - began_s))

        nothing: list[bool] = []
        future = submit(work, nothing, end)
        self._under_way.add(future)
        future.add_done_callback(self._under_way.discard)

    def _ended(self, job: TransferJob, done: Sequence[bool], seconds: float) -> tuple[JobResult, list[Any]]:
        """(how a job ended, the chunks that it should have loaded and has not)."""
        is_whole = bool(done) and all(done)
        loaded: list[Any] = []
        failed: list[Any] = []
        if job.is_promotion and not is_whole:
            for index, key in enumerate(job.keys):
                (loaded if done and done[index] else failed).append(key)
        result = JobResult(
            job_id=job.job_id, success=is_whole, successful_keys=tuple(loaded) or None,
            transfer_time=seconds, transfer_bytes=sum(done) * self.block_size_bytes,
        )  # fmt: skip
        return result, failed

    def _chunk(self, chunk: Any) -> memoryview:
        begin = int(chunk) * self.block_size_bytes
        return self._memory[begin : begin + self.block_size_bytes]


class Lookups(AsyncLookupManager):
    """vLLM's own thread and book-keeping of look-ups."""

    def __init__(self, tier: EmberTier, tier_type: str) -> None:
        self._tier = tier
        super().__init__(tier_type=tier_type)

    def batch_lookup(self, keys: list[Any], req_context: Any) -> Collection[bool]:
        """Of one request, in its thread."""
        return self._tier.find(keys)

    def mark_miss(self, keys: Collection[Any]) -> None:
        """Chunks that could not be loaded. Those that are being looked up anew are answered anyway, and vLLM 0.32
        does not expect to be told both."""
        known = {key: self._lookup_state.get(key) for key in keys}
        super().mark_miss([key for key, state in known.items() if state is not None and state.result is not None])


def chunk_before(request: Any, group: int, position: int) -> bytes | None:
    """The chunk of a request's prefix that comes before a position; None: there is none, or vLLM does not tell."""
    positions = getattr(
        request, "_offload_key_positions", {}
    )  # Of one key it may be asked, but not of which there are.
    before = [(at, key) for key, at in positions.items() if at < position and get_offload_group_idx(key) == group]
    return bytes(max(before, key=lambda entry: entry[0])[1]) if before else None


def name_of(key: bytes) -> bytes:
    """What vLLM's key says about a chunk: block hash and group."""
    return fields_bytes((b"vllm", key))


def namespace_of(spec: Any, settings: Settings, chunk_bytes: int) -> Namespace:
    """Whose chunks are interchangeable. Raises InvalidNamespace."""
    config = spec.config
    parallel = config.parallel
    is_free = parallel.is_parallelism_agnostic or config.replicated_layout
    fields = {
        "groups": [[group.tokens_per_block, list(group.layer_names)] for group in config.groups],
        "tokens_per_hash": config.cache.tokens_per_hash,
        "blocks_per_chunk": spec.blocks_per_chunk,
        "parallel": None if is_free else [parallel.tp_size, parallel.pp_size, parallel.pcp_size, parallel.dcp_size],
        "replicated": config.replicated_layout,
        "canonical": canonical_format_id(config.kv_cache_layout) if config.canonical_layout else None,
        "layout": config.kv_cache_layout,
    }
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:32]
    return Namespace(
        model=config.model.name, revision=settings.revision, dtype=str(config.model.dtype), layout=f"vllm-{digest}",
        page_tokens=max(spec.tokens_per_block) * spec.blocks_per_chunk, kinds=(Kind("kv", payload_bytes=chunk_bytes),),
    )  # fmt: skip


def refuse_seeded() -> None:
    """Raises SeededKeys: no other process, nor this one after a restart, would find a block."""
    seed = getattr(kv_cache_utils, "_NONE_HASH_SEED", None)
    is_fixed = seed in (None, kv_cache_utils.DEFAULT_NONE_HASH_SEED) or "PYTHONHASHSEED" in os.environ
    if not is_fixed:
        raise SeededKeys(
            "vLLM's block hashes begin with a random number of this process, because its hash is not cryptographic: "
            "use --prefix-caching-hash-algo sha256 (or set PYTHONHASHSEED to one number everywhere)"
        )
