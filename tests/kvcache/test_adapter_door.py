"""The adapters' door to the cache: what fails is a miss, soon; what the operator has to put right is said.

What engines make of it is tested in tests/adapters (`make test-adapters`), with a service. Run:
pytest tests/kvcache/test_adapter_door.py.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import emberkv
import pytest
from emberfs.errors import AccessDenied, EmberError, LimitExceeded, Unavailable
from emberkv.adapters.door import FAILED, Door
from emberkv.adapters.settings import Settings
from emberkv.hit import Hit
from emberkv.page import PLACE

NAMESPACE = emberkv.Namespace(model="m", dtype="bf16", layout="l", page_tokens=4, kinds=(emberkv.Kind("kv"),))
SETTINGS = Settings(address="127.0.0.1:1", timeout_s=5.0, retry_s=2.0)


class FakeCache:
    """In memory; the next call raises `fault`, and every read takes `read_s`."""

    def __init__(self) -> None:
        self.pages: dict[bytes, bytes] = {}
        self.fault: EmberError | None = None
        self.now_s = 100.0
        self.read_s = 0.0
        self.loses: set[bytes] = set()
        self.takes = 65_536
        self.parents: list[bytes | None] = []
        self.calls = self.opened = self.asked = 0
        self.reads: list[list[bytes]] = []

    def open(self, settings: Settings, namespace: emberkv.Namespace) -> Any:
        self.opened += 1
        self._fail()
        return self

    def _fail(self) -> None:
        self.calls += 1
        fault, self.fault = self.fault, None
        if fault is not None:
            raise fault

    def opaque_keys(self, names: list[bytes]) -> list[bytes]:
        return [name.ljust(32, b"\0") for name in names]

    def put(
        self, keys: list[bytes], payloads: list[bytes], parent: bytes | None, chained: bool, durable: str
    ) -> list[str]:
        assert durable == "committed"
        self._fail()
        self.pages.update(zip(keys, payloads, strict=True))
        self.parents.append(parent)
        return ["stored"] * len(keys)

    def lookup(self, keys: list[bytes], lease_s: float) -> list[Hit | None]:
        self._fail()
        assert len(keys) <= self.takes
        self.asked += 1
        return [
            Hit(1, 4, "whole", 7, key, (PLACE.pack(1, 0, len(self.pages[key]), 0),), 0) if key in self.pages else None
            for key in keys
        ]

    def get_into(self, hit: Hit, buffers: list[bytearray]) -> list[bool]:
        self._fail()
        self.now_s += self.read_s
        self.reads.append([key.rstrip(b"\0") for key in hit.keys])
        for key, buffer in zip(hit.keys, buffers, strict=True):
            buffer[:] = self.pages[key]
        return [key not in self.loses for key in hit.keys]

    def exists(self, keys: list[bytes]) -> list[bool]:
        self._fail()
        return [key in self.pages for key in keys]

    def remove(self, keys: list[bytes]) -> int:
        assert len(keys) <= self.takes
        return sum(self.pages.pop(key, None) is not None for key in keys)

    def close(self) -> None:
        self.calls += 1


def door_of(cache: FakeCache, begin: Callable[[Callable[[], None]], None] = lambda work: work()) -> Door:
    return Door(SETTINGS, NAMESPACE, now_s=lambda: cache.now_s, open_cache=cache.open, begin=begin)


def test_pages_are_read_together_and_have_their_length() -> None:
    cache = FakeCache()
    door = door_of(cache)
    assert door.put([b"a", b"b"], [b"aaaa", b"bb"]) == ["stored", "stored"]
    names = [b"a", b"x", b"b", b"b"]
    assert door.find(names) == [4, None, 2, 2]
    buffers = [bytearray(4), bytearray(4), bytearray(2), bytearray(1)]
    assert door.load(names, buffers) == [True, False, True, False]
    assert (bytes(buffers[0]), bytes(buffers[2])) == (b"aaaa", b"bb")
    assert cache.reads == [[b"a", b"b"]]


def test_what_was_found_is_loaded_without_looking_it_up_again_while_its_lease_lasts() -> None:
    cache = FakeCache()
    door = door_of(cache)
    door.put([b"a", b"b"], [b"a", b"b"])
    door.find([b"a"])
    asked = cache.asked

    def load(*names: bytes) -> list[bool]:
        return door.load(names, [bytearray(1) for _ in names])

    assert load(b"a") == [True] and cache.asked == asked
    assert load(b"a", b"b") == [True, True] and cache.asked == asked + 1
    assert load(b"b") == [True] and cache.asked == asked + 1
    door.forget([b"a", b"x"])
    assert load(b"a") == [True] and cache.asked == asked + 2
    cache.now_s += SETTINGS.lease_s + 1
    assert load(b"a") == [True] and cache.asked == asked + 3
    del cache.pages[cache.opaque_keys([b"a"])[0]]
    assert door.find([b"a"]) == [None]  # Always asked.
    assert load(b"a") == [False]


def test_pages_after_one_that_is_not_there_come_after_none() -> None:
    cache = FakeCache()
    door = door_of(cache)
    door.put([b"a"], [b"a"])
    door.put([b"b"], [b"b"], b"a")
    door.put([b"c"], [b"c"], b"x")
    assert cache.parents == [None, *cache.opaque_keys([b"a"]), None]
    evicting = Settings(address="127.0.0.1:1", policy="on-evict")
    Door(evicting, NAMESPACE, open_cache=cache.open).put([b"d"], [b"d"], b"y")  # It comes later.
    assert cache.parents[3:] == cache.opaque_keys([b"y"])


def test_a_prompt_of_any_length_is_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emberkv.adapters.door.NAMES_MAX", 3)
    cache = FakeCache()
    cache.takes = 3
    door = door_of(cache)
    names = [bytes([number]) for number in range(1, 9)]
    door.put(names[:7], names[:7])
    assert door.find(names) == [1] * 7 + [None] and cache.asked == 3
    assert door.load(names, [bytearray(1) for _ in names]) == [True] * 7 + [False]
    assert door.remove(names) == 7


def test_what_is_remembered_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emberkv.adapters.door.FOUND_MAX", 2)
    cache = FakeCache()
    door = door_of(cache)
    names = [b"a", b"b", b"c"]
    door.put(names, names)
    door.find(names)
    asked = cache.asked
    assert door.load([b"b", b"c"], [bytearray(1), bytearray(1)]) == [True, True] and cache.asked == asked
    assert door.load([b"a"], [bytearray(1)]) == [True] and cache.asked == asked + 1


def test_a_forked_child_has_nothing_and_takes_nothing_away() -> None:
    cache = FakeCache()
    door = door_of(cache)
    door.put([b"a"], [b"a"])
    calls = cache.calls
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Of forks in processes with threads, from Python 3.12 on.
        child = os.fork()
    if child == 0:
        nothing = door.find([b"a"]) == [None] and door.load([b"a"], [bytearray(1)]) == [False]
        door.close()
        os._exit(0 if nothing and cache.calls == calls else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert door.find([b"a"]) == [1]


def test_a_failure_shuts_the_door_for_a_while() -> None:
    cache = FakeCache()
    door = door_of(cache)
    door.put([b"a"], [b"a"])
    cache.fault = Unavailable("gone")
    assert door.find([b"a"]) == [None]
    calls = cache.calls
    assert door.find([b"a"]) == [None] and door.put([b"b"], [b"b"]) == [FAILED]
    assert not door.is_open and cache.calls == calls and door.counts.shut == 2
    cache.now_s += SETTINGS.retry_s
    assert door.find([b"a"]) == [1]


def test_no_call_waits_for_a_service_that_was_away_a_moment_ago() -> None:
    cache, begun = FakeCache(), list[Callable[[], None]]()
    door = door_of(cache, begun.append)
    door.put([b"a"], [b"a"])
    cache.fault = Unavailable("gone")
    assert door.find([b"a"]) == [None]
    calls = cache.calls
    for _ in range(3):
        cache.now_s += SETTINGS.retry_s
        assert door.find([b"a"]) == [None]  # Whatever time has gone: who asks is somebody else, and one only.
    assert cache.calls == calls and len(begun) == 1
    cache.fault = Unavailable("still gone")
    begun.pop()()
    assert door.find([b"a"]) == [None] and not begun  # Not again at once.
    cache.now_s += SETTINGS.retry_s
    assert door.find([b"a"]) == [None] and len(begun) == 1
    begun.pop()()
    assert door.find([b"a"]) == [1]


def test_a_page_that_is_too_large_is_no_reason_to_shut_it() -> None:
    cache = FakeCache()
    door = door_of(cache)
    cache.fault = LimitExceeded("64 MiB at most")
    assert door.put([b"a"], [b"a"]) == [FAILED]
    assert door.is_open


def test_reads_that_run_into_their_deadline_shut_it() -> None:
    cache = FakeCache()
    door = door_of(cache)
    door.put([b"a"], [b"a"])
    cache.loses = set(cache.opaque_keys([b"a"]))
    assert door.load([b"a"], [bytearray(1)]) == [False]
    assert door.is_open  # One page was lost, quickly.
    cache.read_s = SETTINGS.timeout_s
    assert door.load([b"a"], [bytearray(1)]) == [False]
    assert not door.is_open


def test_an_engine_starts_without_the_service() -> None:
    cache = FakeCache()
    cache.fault = Unavailable("not yet")
    door = door_of(cache)
    assert door.find([b"a"]) == [None] and cache.opened == 1
    cache.now_s += SETTINGS.retry_s
    assert door.put([b"a"], [b"a"]) == ["stored"] and cache.opened == 2


def test_what_the_operator_has_to_put_right_is_raised() -> None:
    cache = FakeCache()
    cache.fault = AccessDenied("no such token")
    with pytest.raises(AccessDenied):
        door_of(cache)


def test_a_closed_door_has_nothing() -> None:
    door = door_of(FakeCache())
    door.put([b"a"], [b"a"])
    door.close()
    assert door.find([b"a"]) == [None]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "address must be given"),
        ({"address": ""}, "where the service is"),
        ({"address": "a:1", "adress": 1}, "no such setting: adress"),
        ({"address": "a:1", "timeout_s": "5"}, "timeout_s is of type float, not '5'"),
        ({"address": "a:1", "timeout_s": 0}, "above 0"),
        ({"address": "a:1", "threads": True}, "threads is of type int"),
        ({"address": "a:1", "threads": 65}, "threads is 1 to 64"),
    ],
)
def test_settings_that_are_none(given: dict[str, Any], said: str) -> None:
    with pytest.raises(emberkv.InvalidNamespace, match=said):
        Settings.read(given)


def test_settings_out_of_json() -> None:
    given = {"address": "a:1", "timeout_s": 3, "tls": None, "shares_memory": False, "threads": 2}
    read = Settings.read(given)
    assert (read.timeout_s, read.threads, read.shares_memory, read.tenant) == (3, 2, False, "default")


def test_the_configurations_in_the_documents_are_ones() -> None:
    page = Path(__file__).parents[2] / "docs" / "kvcache-adapters.md"
    lmcache, vllm, sglang = (
        json.loads(block) for block in re.findall(r"```json\n(.*?)```", page.read_text(), re.DOTALL)
    )
    params, (tier,) = lmcache["adapter_params"], vllm["kv_connector_extra_config"]["secondary_tiers"]
    of_lmcache, of_vllm = {"dtype", "chunk_size"}, {"type", "module_path"}
    assert of_lmcache <= set(params) and of_vllm <= set(tier)
    for settings in (
        {name: value for name, value in params.items() if name not in of_lmcache},
        {name: value for name, value in tier.items() if name not in of_vllm},
        sglang["emberkv"],
        json.loads(re.findall(r"^  emberkv: (.*)$", page.read_text(), re.MULTILINE)[0]),
    ):
        assert Settings.read(settings).revision == "main"


def test_no_engine_is_imported_with_emberkv() -> None:
    code = "import sys, emberkv.adapters.door; print(any(each in sys.modules for each in ('vllm', 'torch', 'lmcache')))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
