"""LMCache's L2 adapter, for its server process.

    lmcache server --l2-adapter '{"type": "plugin", "module_path": "emberkv.adapters.lmcache",
                                  "class_name": "EmberL2Adapter", "adapter_params": {"address": "127.0.0.1:7400", ...}}'

LMCache submits tasks and polls three event descriptors; our threads do the work and always finish a task: a look-up or
load that failed or came too late has found nothing, and such a store has failed. What was looked up is kept by a lease
until it is unlocked, or the lease ends: LMCache's "lock" without anything that could leak.

A namespace holds what LMCache's own keys do not say (revision, dtype, layout, tokens of a chunk); the rest, such as the
rank, is in the key. Chunks of one store task are a chain, so that the last goes before the first when room is needed.

Source: lmcache 0.5.6, `L2AdapterInterface`. Does not know: the shape of what it keeps.
"""

from __future__ import annotations

import logging
import os
import struct
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

from emberfs.errors import EmberError
from lmcache.lmcache_native import Bitmap
from lmcache.v1.distributed.internal_api import L2StoreResult
from lmcache.v1.distributed.l2_adapters.base import L2AdapterInterface
from lmcache.v1.platform import create_event_notifier

from ..errors import InvalidNamespace, SeededKeys
from ..namespace import Kind, Namespace, field_bytes, fields_bytes
from .door import KEPT, Door
from .settings import Settings
from .workers import Workers

log = logging.getLogger(__name__)

MODELS_MAX = 64
PYTHON_HASH_BYTES = 8
"""LMCache writes Python's hash so; blake3 and sha256_cbor have 32."""


class Tasks:
    """The tasks of one kind: numbers, results, and the event descriptor that says there are some."""

    def __init__(self) -> None:
        self.notifier = create_event_notifier()
        self._lock = threading.Lock()
        self._results: dict[int, Any] = {}

    def finish(self, task: int, result: Any) -> None:
        """The result is there before it is told of."""
        with self._lock:
            self._results[task] = result
            if self.notifier.fileno() >= 0:  # An engine may still ask after it has closed us, but does not wait.
                self.notifier.notify()

    def pop(self, task: int) -> Any:
        """The result of a task, once; None: not yet, or it was asked for already."""
        with self._lock:
            return self._results.pop(task, None)

    def pop_all(self) -> dict[int, Any]:
        """All that are there."""
        with self._lock:
            results, self._results = self._results, {}
        return results

    def close(self) -> None:
        """Nobody waits any more."""
        with self._lock:
            self.notifier.close()


class EmberL2Adapter(L2AdapterInterface):
    """See the module. `params`: those of `Settings`, and dtype, layout and chunk_size, which name the namespace."""

    def __init__(self, params: Mapping[str, Any], l1_memory_desc: Any = None) -> None:
        super().__init__()
        given = dict(params)
        self._dtype = str(given.pop("dtype", ""))
        self._layout = str(given.pop("layout", "lmcache"))
        self._chunk_tokens = int(given.pop("chunk_size", 256))
        self._settings = Settings.read(given)
        self._namespace("probe")  # Whatever is wrong with these fields is said now.
        self._stores, self._lookups, self._loads = Tasks(), Tasks(), Tasks()
        self._lock = threading.Lock()
        self._next_task = 0
        self._opening = threading.Lock()
        self._doors: dict[str, Door | None] = {}
        self._refusal = ""
        self._workers = Workers(self._settings, "l2")

    def get_store_event_fd(self) -> int:
        """Told of finished stores."""
        return int(self._stores.notifier.fileno())

    def get_lookup_and_lock_event_fd(self) -> int:
        """Told of finished look-ups."""
        return int(self._lookups.notifier.fileno())

    def get_load_event_fd(self) -> int:
        """Told of finished loads."""
        return int(self._loads.notifier.fileno())

    # --- tasks -----------------------------------------------------------------------------------------------------

    def submit_store_task(self, keys: list[Any], objects: list[Any]) -> int:
        """Keep objects."""
        task, failed = self._new_task(), L2StoreResult(False, 0)
        self._workers.store(lambda: self._store(keys, objects), failed, partial(self._stores.finish, task))
        return task

    def pop_completed_store_tasks(self) -> dict[int, Any]:
        """Task -> how it ended."""
        return self._stores.pop_all()

    def submit_lookup_and_lock_task(self, keys: list[Any], group_layout_descs: Mapping[int, Any]) -> int:
        """Find objects, and keep them by a lease."""
        task = self._new_task()
        self._workers.load(lambda: self._lookup(keys), Bitmap(len(keys)), partial(self._lookups.finish, task))
        return task

    def query_lookup_and_lock_result(self, task_id: int) -> Any:
        """Which were found; None: not known yet."""
        return self._lookups.pop(task_id)

    def submit_load_task(self, keys: list[Any], objects: list[Any]) -> int:
        """Fill objects."""
        task = self._new_task()
        self._workers.load(lambda: self._load(keys, objects), Bitmap(len(keys)), partial(self._loads.finish, task))
        return task

    def query_load_result(self, task_id: int) -> Any:
        """Which were filled; None: not known yet."""
        return self._loads.pop(task_id)

    def submit_unlock(self, keys: list[Any]) -> None:
        """Looked-up objects are not needed any more. It cannot fail, nor wait."""
        for model, picked in by(keys, lambda key: key.model_name).items():
            door = self._doors.get(model)
            if door is not None:
                door.forget([name_of(keys[index]) for index in picked])

    def delete(self, keys: list[Any]) -> None:
        """Take objects out, when LMCache's own quotas say so."""
        self._workers.store(lambda: self._delete(keys), None, lambda _: None)

    def report_status(self) -> dict[str, Any]:
        """What LMCache shows of us."""
        doors = [door for door in list(self._doors.values()) if door is not None]
        return {
            "is_healthy": not self._refusal and all(door.is_open for door in doors),
            "type": type(self).__name__,
            "address": self._settings.address,
            "error": self._refusal,
            "namespaces": [door.namespace.name for door in doors],
            "calls": sum(door.counts.calls for door in doors),
            "failed_calls": sum(door.counts.failed for door in doors),
        }

    def close(self) -> None:
        """End it."""
        self._workers.close()
        for door in self._doors.values():
            if door is not None:
                door.close()
        for tasks in (self._stores, self._lookups, self._loads):
            tasks.close()

    def _new_task(self) -> int:
        with self._lock:
            task, self._next_task = self._next_task, self._next_task + 1
        return task

    # --- in our threads --------------------------------------------------------------------------------------------

    def _store(self, keys: list[Any], objects: list[Any]) -> Any:
        stored: list[Any] = []
        sizes: list[int] = []
        is_whole = True
        for picked in chains_of(keys):
            door = self._door(keys[picked[0]].model_name, keys[picked[0]])
            if door is None:
                return L2StoreResult(False, 0)
            is_chain = len(picked) > 1 and chain_of(keys[picked[0]]) == chain_of(keys[picked[1]])
            buffers = [objects[index].byte_array for index in picked]
            names = [name_of(keys[index]) for index in picked]
            states = door.put(names, buffers, chained=is_chain)
            is_whole &= KEPT.issuperset(states)
            for index, buffer, state in zip(picked, buffers, states, strict=True):
                if state == "stored":
                    stored.append(keys[index])
                    sizes.append(memoryview(buffer).nbytes)
        if stored:
            self._notify_keys_stored(stored, sizes)
        return L2StoreResult(is_whole, sum(sizes))

    def _lookup(self, keys: list[Any]) -> Any:
        bitmap = Bitmap(len(keys))
        for door, picked in self._by_model(keys):
            for index, size in zip(picked, door.find([name_of(keys[index]) for index in picked]), strict=True):
                if size is not None:
                    bitmap.set(index)
        return bitmap

    def _load(self, keys: list[Any], objects: list[Any]) -> Any:
        bitmap = Bitmap(len(keys))
        for door, picked in self._by_model(keys):
            names = [name_of(keys[index]) for index in picked]
            done = door.load(names, [objects[index].byte_array for index in picked])
            for index, good in zip(picked, done, strict=True):
                if good:
                    bitmap.set(index)
        loaded = [keys[index] for index in bitmap.get_indices_list()]
        if loaded:
            self._notify_keys_accessed(loaded)
        return bitmap

    def _delete(self, keys: list[Any]) -> None:
        gone: list[Any] = []
        sizes: list[int] = []
        for door, picked in self._by_model(keys):
            names = [name_of(keys[index]) for index in picked]
            there = door.find(names)
            if door.remove(names):
                gone += [keys[index] for index, size in zip(picked, there, strict=True) if size is not None]
                sizes += [size for size in there if size is not None]
        if gone:
            self._notify_keys_deleted(gone, sizes)

    # --- namespaces ------------------------------------------------------------------------------------------------

    def _by_model(self, keys: Sequence[Any]) -> list[tuple[Door, list[int]]]:
        """The doors of the keys, and which keys go through each; not those of a model without a door."""
        models = by(keys, lambda key: key.model_name)
        doors = [(self._door(model, keys[picked[0]]), picked) for model, picked in models.items()]
        return [(door, picked) for door, picked in doors if door is not None]

    def _door(self, model: str, key: Any) -> Door | None:
        """None: not with this configuration."""
        try:
            refuse_seeded(key.chunk_hash)
            with self._opening:
                if model not in self._doors:
                    if len(self._doors) >= MODELS_MAX:
                        raise InvalidNamespace(f"more than {MODELS_MAX} models in one LMCache server")
                    self._doors[model] = None  # It stays so if the door cannot be made.
                    self._doors[model] = Door(self._settings, self._namespace(model))
                return self._doors[model]
        except EmberError as error:
            if not self._refusal:
                self._refusal = str(error)
                log.error("the KV cache at %s is not used: %s", self._settings.address, error)
            return None

    def _namespace(self, model: str) -> Namespace:
        if not self._dtype:
            raise InvalidNamespace('dtype must be given: that of the KV cache, such as "bfloat16" or "fp8_e4m3"')
        return Namespace(
            model=model, revision=self._settings.revision, dtype=self._dtype, layout=self._layout,
            page_tokens=self._chunk_tokens, kinds=(Kind("kv"),),
        )  # fmt: skip


def by(keys: Sequence[Any], what: Callable[[Any], Hashable]) -> dict[Any, list[int]]:
    """Which of the keys have the same `what`, in their order."""
    groups: dict[Any, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(what(key), []).append(index)
    return groups


def chain_of(key: Any) -> tuple[Any, ...]:
    """What keys that follow each other have in common."""
    return key.model_name, key.kv_rank, key.object_group_id, key.cache_salt


def chains_of(keys: Sequence[Any]) -> list[list[int]]:
    """The keys that follow each other; those of a model that follow none go together, which is one call for all."""
    chains = list(by(keys, chain_of).values())
    alone = [chain[0] for chain in chains if len(chain) == 1]
    together = by([keys[index] for index in alone], lambda key: key.model_name).values()
    return [
        *(chain for chain in chains if len(chain) > 1),
        *([alone[index] for index in picked] for picked in together),
    ]


def name_of(key: Any) -> bytes:
    """What LMCache's key says about an object beside its model: rank, group, salt and hash."""
    return _name_before(key.kv_rank, key.object_group_id, key.cache_salt) + field_bytes(key.chunk_hash)


@lru_cache(maxsize=1024)
def _name_before(kv_rank: int, object_group_id: int, cache_salt: str) -> bytes:
    """What the names of all objects of a rank, a group and a salt begin with."""
    return fields_bytes((b"lmcache", struct.pack("<QQ", kv_rank, object_group_id), cache_salt.encode()))


def refuse_seeded(chunk_hash: bytes) -> None:
    """Raises SeededKeys: no other process, nor this one after a restart, would find the chunk."""
    if len(chunk_hash) == PYTHON_HASH_BYTES and not os.environ.get("PYTHONHASHSEED", "random").isdigit():
        raise SeededKeys(
            "LMCache hashes chunks with Python's hash(), whose seed is another one in each process: "
            "start the server with --hash-algorithm blake3 (or set PYTHONHASHSEED to one number everywhere)"
        )
