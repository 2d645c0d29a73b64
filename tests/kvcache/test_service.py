"""A service and its clients on a real store: what is put is found, read, evicted, and found again after a restart."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import emberfs
import emberkv
import pytest
from emberfs import StoreClosed
from emberfs.checksum import crc32c
from emberfs.errors import AccessDenied, EmberError, InvalidPath, LimitExceeded, Unreachable
from emberkv import messages
from emberkv.errors import SeatGone
from emberkv.hit import Hit
from emberkv.operator import Operator
from emberkv.page import HEADER_BYTES, NO_PLACE, PLACE, Place, encode_header
from emberkv.reading import PageReader
from emberkv.tenants import read_tenants

from tests.fs.cli_run import emberline
from tests.fs.sharing_run import stopped
from tests.kvcache.serving import Server

PAGE = 20_000
MIB = 1 << 20
NAMESPACE = emberkv.Namespace(
    model="test", dtype="bf16", layout="mla", page_tokens=4,
    kinds=(emberkv.Kind("kv"), emberkv.Kind("state", policy="trailing:1")),
)  # fmt: skip
PLAIN = emberkv.Namespace(model="plain", dtype="bf16", layout="mla", page_tokens=4, kinds=(emberkv.Kind("kv"),))

Serve = Callable[..., "Server"]


def page(seed: int, size: int = PAGE) -> bytes:
    return bytes([seed % 251]) * size


def tokens(prompt: int, pages: int) -> list[int]:
    return [prompt * 1000 + each for each in range(4 * pages)]


def test_what_was_put_is_matched_and_read(serve: Serve) -> None:
    with emberkv.connect(serve().address, PLAIN) as cache:
        keys = cache.keys(tokens(1, 40))
        pages = [page(each) for each in range(40)]
        assert cache.put(keys[:30], pages[:30]) == ["stored"] * 30
        cache.flush()
        assert cache.put(keys[28:], pages[28:], parent=keys[27]) == ["known"] * 2 + ["stored"] * 10
        cache.flush()
        hit = cache.match(keys)
        assert (hit.pages, hit.tokens, hit.reason) == (40, 160, "whole")
        assert cache.get(hit) == pages
        assert cache.get(Hit.decode(hit.encode())) == pages
        shorter = cache.match([*keys[:5], *cache.keys(tokens(2, 3))])
        assert (shorter.pages, shorter.reason) == (5, "absent")
        buffers = [bytearray(PAGE), bytearray(100)]
        assert cache.get_into(hit, buffers, first=7) == [True, True]
        assert bytes(buffers[0]) == pages[7] and bytes(buffers[1]) == pages[8][:100]
        assert cache.exists([keys[3], cache.keys(tokens(9, 1))[0]]) == [True, False]
        with pytest.raises(LimitExceeded, match="20000 bytes: not 20001"):
            cache.get_into(hit, [bytearray(PAGE + 1)])
        with pytest.raises(LimitExceeded, match="40 pages: not 2 from 39"):
            cache.get_into(hit, [bytearray(PAGE)] * 2, first=39)
        with pytest.raises(ValueError, match="not a hit"):
            Hit.decode(b"something else")
        assert cache.extend(hit) and cache.extend(shorter)
        cache.release(hit, shorter)
        assert not cache.extend(hit)


def test_a_kind_of_a_fixed_size_takes_no_other(serve: Serve) -> None:
    kinds = (emberkv.Kind("kv", payload_bytes=PAGE),)
    namespace = emberkv.Namespace(model="fixed", dtype="bf16", layout="mla", page_tokens=4, kinds=kinds)
    with emberkv.connect(serve().address, namespace) as cache:
        keys = cache.keys(tokens(1, 2))
        with pytest.raises(LimitExceeded, match="this kind has pages of 20000"):
            cache.put(keys, [page(1), page(2, PAGE - 1)])
        assert cache.put(keys, [page(1), page(2)]) == ["stored"] * 2
        plain = emberkv.connect(cache._caller.addresses[0], PLAIN)
        with plain, pytest.raises(LimitExceeded, match="1/64 of the capacity"):
            plain.put(keys[:1], [page(1, 2 * MIB)])


def test_a_seat_is_nobody_elses(serve: Serve) -> None:
    address = serve().address
    with emberkv.connect(address, PLAIN, tenant="a") as one, emberkv.connect(address, PLAIN, tenant="b") as two:
        keys = one.keys(tokens(1, 2))
        one.put(keys, [page(1)] * 2)
        one.flush()
        assert abs(one._caller.seated().seat - two._caller.seated().seat) > 1 << 20
        with pytest.raises(SeatGone):
            two._caller.call(messages.Match(one._caller.seated().seat + 1, [b"".join(keys)], 0.0), messages.Matched)


def test_opaque_keys_stand_for_themselves(serve: Serve) -> None:
    with emberkv.connect(serve().address, PLAIN) as cache:
        keys = cache.opaque_keys([b"one", b"two", b"three"])
        cache.put(keys[:2], [page(1), page(2)], chained=False)
        cache.flush()
        hits = cache.lookup(keys)
        assert hits[2] is None
        assert [cache.get(hit) for hit in hits if hit is not None] == [[page(1)], [page(2)]]
        assert cache.remove(keys[:1]) == 1
        assert cache.exists(keys) == [False, True, False]


def test_a_state_decides_how_much_of_a_prefix_is_usable(serve: Serve) -> None:
    with emberkv.connect(serve().address, NAMESPACE) as cache:
        keys = cache.keys(tokens(1, 8))
        cache.put(keys, [page(each) for each in range(8)])
        cache.flush()
        assert cache.match(keys).reason == "no state"
        cache.put(keys[5:6], [page(99, 300)], parent=keys[4], kind="state")
        cache.flush()
        hit = cache.match(keys)
        assert hit.pages == 6
        buffer = bytearray(300)
        assert cache.get_into(hit, [buffer], kind="state", first=5) == [True]
        assert bytes(buffer) == page(99, 300)
        assert cache.exists(keys[4:6], kind="state") == [False, True]
        assert cache.stat()["namespaces"][NAMESPACE.name]["counts"]["misses"] == {"kind 1 missing": 1}


def test_an_index_survives_the_service(serve: Serve, store: str) -> None:
    keys: list[bytes] = []
    for end in (signal.SIGTERM, signal.SIGKILL, signal.SIGTERM):
        server = serve()
        with emberkv.connect(server.address, PLAIN) as cache:
            fresh = cache.keys(tokens(1, len(keys) + 5))
            hit = cache.match(fresh)
            assert hit.pages == len(keys)
            assert cache.get(hit) == [page(each) for each in range(len(keys))]
            added = range(len(keys), len(fresh))
            cache.put(fresh[len(keys) :], [page(each) for each in added], parent=keys[-1] if keys else None,
                      durable="committed")  # fmt: skip
            keys = fresh
        server.end(end)
    with emberfs.connect(store) as client:
        segments = [name for name, _ in client.list(f"/kv/{PLAIN.name}/segments")]
        # One per writer; what a killed server left is taken over. The others were spares, which go soon.
        assert set(segments) - {"00000002", "00000004", "00000006"} == {"00000001", "00000003", "00000005"}


def test_a_client_finds_a_service_that_came_back(serve: Serve, tmp_path: Path) -> None:
    first, address = serve(), f"unix:{tmp_path}/second"
    cache = emberkv.connect(f"{first.address},{address}", PLAIN, timeout_s=30)
    with contextlib.closing(cache):
        keys = cache.keys(tokens(1, 3))
        cache.put(keys, [page(1)] * 3, durable="committed")
        first.end()
        serve(listen=address)
        assert cache.match(keys).pages == 3
        assert cache.put(keys, [page(1)] * 3) == ["known"] * 3


def test_a_standby_takes_over(serve: Serve, tmp_path: Path) -> None:
    first = serve(listen=f"unix:{tmp_path}/first")
    address = first.address
    with emberkv.connect(f"{address},unix:{tmp_path}/second", PLAIN, timeout_s=60) as cache:
        keys = cache.keys(tokens(1, 3))
        cache.put(keys, [page(1)] * 3, durable="committed")
        serve(listen=f"unix:{tmp_path}/second")
        first.end(signal.SIGKILL)
        hit = cache.match(keys)
        assert cache.get(hit) == [page(1)] * 3
        assert cache.stat()["namespaces"][PLAIN.name]["epoch"] == 2
        assert cache.put(cache.keys(tokens(2, 3)), [page(2)] * 3, durable="committed") == ["stored"] * 3


def test_a_full_cache_evicts_the_coldest_and_gives_the_space_back(serve: Serve, store: str) -> None:
    with emberkv.connect(serve(4 * MIB).address, PLAIN) as cache:
        # Four times what there is room for.
        prompts = [cache.keys(tokens(prompt, 20)) for prompt in range(1, 41)]
        for number, keys in enumerate(prompts):
            cache.match(prompts[0], lease_s=0)  # It stays warm.
            states = cache.put(keys, [page(number)] * 20)
            cache.flush()
            assert set(states) <= {"stored"}
        assert cache.match(prompts[0], lease_s=0).pages == 20
        assert cache.get(cache.match(prompts[0])) == [page(0)] * 20
        assert cache.match(prompts[5], lease_s=0).pages == 0
        last = cache.match(prompts[-1])
        assert cache.get(last) == [page(len(prompts) - 1)] * 20
        numbers = cache.stat()["namespaces"][PLAIN.name]
        assert numbers["disk_bytes"] <= 4 * MIB and numbers["live_bytes"] <= 0.9 * 4 * MIB
        assert numbers["counts"]["evicted_pages"] > 500


def test_damage_is_a_miss_and_is_told(serve: Serve, store: str) -> None:
    with emberkv.connect(serve().address, PLAIN) as cache:
        keys = cache.keys(tokens(1, 6))
        pages = [page(each) for each in range(6)]
        cache.put(keys, pages)
        cache.flush()
        hit = cache.match(keys)
        with emberfs.connect(store) as client:
            directory = f"/kv/{PLAIN.name}/segments"
            name = min(each for each, _ in client.list(directory))  # The other one is the spare.
            with client.open(f"{directory}/{name}", "r+b") as file:
                file.seek(2 * (PAGE + 96) + 5000)
                file.write(b"damage")
        assert cache.get(hit) == [*pages[:2], None, *pages[3:]]
        soon = time.monotonic() + 60
        while (again := cache.match(keys)).reason == "whole" and time.monotonic() < soon:
            time.sleep(0.01)
        assert (again.pages, again.reason) == (2, "damaged")
        assert cache.put(keys, pages) == ["known"] * 2 + ["stored"] + ["known"] * 3
        cache.flush()
        assert cache.get(cache.match(keys)) == pages


def test_a_page_is_compared_with_its_own_checksum_however_it_was_read(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a service: the second read goes past those of the store, if the native part was built."""
    keys, payloads = [bytes([each]) * 32 for each in range(7)], [page(each) for each in range(7)]
    segment, places = b"", list[Place]()
    for key, payload in zip(keys, payloads, strict=True):
        places.append(Place(1, len(segment), PAGE, crc32c(payload)))
        segment += encode_header(places[-1], key=key, parent=bytes(32), kind=0, tenant=3) + payload
    packed = b"".join(NO_PLACE if number == 1 else PLACE.pack(*place) for number, place in enumerate(places))
    monkeypatch.setattr("emberkv.reading.BATCH_BYTES", 3 * (PAGE + HEADER_BYTES))
    with emberfs.connect(store) as client:
        client.put("/00000001", segment, chunk_size_bytes=64 << 10)
        client.batch_write([("/00000001", places[4].offset + HEADER_BYTES + 50, b"not of this page")])
        batches, read = list[int](), client.batch_read

        def batch_read(items: Any, into: Any, **more: Any) -> Any:
            batches.append(len(items) // 2)
            return read(items, into, **more)

        monkeypatch.setattr(client, "batch_read", batch_read)
        reader = PageReader(client, "")
        for _ in range(2):
            views = [memoryview(bytearray(PAGE)) for _ in keys]
            done = reader.read(keys, packed, views, kind=0, tenant=3)
            assert done == [True, False, True, True, False, True, True]
            assert all(view == payload for view, payload, good in zip(views, payloads, done, strict=True) if good)
        assert batches == [2, 3, 1] * 2, "as many as have room, one that is not there too"
        reader.close()


def test_tenants_need_their_token_and_see_only_their_own(serve: Serve, tmp_path: Path) -> None:
    digests = {name: [hashlib.sha256(f"{name}-token".encode()).hexdigest()] for name in ("acme", "umbrella")}
    file = tmp_path / "tenants.json"
    file.write_text(json.dumps({"tenants": digests, "operators": []}))
    address = serve(tenants=str(file)).address
    with pytest.raises(AccessDenied):
        emberkv.connect(address, PLAIN, tenant="acme", token="umbrella-token")
    with (
        emberkv.connect(address, PLAIN, tenant="acme", token="acme-token") as acme,
        emberkv.connect(address, PLAIN, tenant="umbrella", token="umbrella-token") as umbrella,
    ):
        keys = acme.keys(tokens(1, 3))
        acme.put(keys, [page(1)] * 3)
        assert umbrella.keys(tokens(1, 3)) != keys
        assert umbrella.match(keys).pages == 0
        assert list(umbrella.stat()["namespaces"][PLAIN.name]["tenants"]) == ["umbrella"]
    said = emberline("kv", "doctor", "--address", address, "--token", "acme-token", code=1).stdout
    assert "give an operator's --token" in said


@pytest.mark.parametrize("digest", ["my token", "é" * 64, "A" * 64, ""])
def test_a_file_of_tenants_has_digests(tmp_path: Path, digest: str) -> None:
    file = tmp_path / "tenants.json"
    file.write_text(json.dumps({"tenants": {"acme": [digest]}}))
    with pytest.raises(InvalidPath, match="no SHA-256") as refused:
        read_tenants(file)
    assert not digest or digest not in str(refused.value)


def test_a_page_that_one_writes_is_pending_for_others_until_it_gives_up(serve: Serve) -> None:
    address = serve().address
    with emberkv.connect(address, PLAIN) as one, emberkv.connect(address, PLAIN) as two:
        keys = one.keys(tokens(1, 2))
        parents = bytes(32) + keys[0]
        answer = one._caller.ask(
            lambda seat: messages.Reserve(seat, 0, b"".join(keys), parents, [PAGE, PAGE]), messages.Reserved
        )
        assert two.put(keys, [page(1)] * 2) == ["pending"] * 2
        one._caller.ask(lambda seat: messages.GiveUp(seat, answer.reservation), messages.Okay)
        assert two.put(keys, [page(1)] * 2) == ["stored"] * 2
        two.flush()
        assert one.get(one.match(keys)) == [page(1)] * 2


def test_an_operator_sees_limits_and_takes_away(serve: Serve) -> None:
    address = serve().address
    with emberkv.connect(address, PLAIN) as cache, emberkv.Operator(address) as operator:
        prompts = [cache.keys(tokens(prompt, 10)) for prompt in range(1, 6)]
        for keys in prompts:
            cache.put(keys, [page(1)] * 10)
            cache.flush()
        operator.set_quota(PLAIN.name, "default", 25 * (PAGE + 96))
        operator.collect(PLAIN.name)
        numbers = operator.stat()["namespaces"][PLAIN.name]
        assert numbers["pages"] == 25
        assert numbers["tenants"]["default"]["bytes"] == 25 * (PAGE + 96)
        assert cache.match(prompts[0]).pages == 0 and cache.match(prompts[4], lease_s=0).pages == 10
        assert cache.put(cache.keys(tokens(7, 10)), [page(2)] * 10) == ["stored"] * 10
        cache.flush()
        assert operator.stat()["namespaces"][PLAIN.name]["pages"] == 25
        assert operator.erase("default") == {PLAIN.name: {"pages": 25, "bytes": 25 * (PAGE + 96)}}
        assert cache.match(cache.keys(tokens(7, 10))).pages == 0
        assert operator.drop(PLAIN.name) == {"default": {"pages": 0, "bytes": 0}}
        operator.collect(PLAIN.name)


def test_an_address_that_is_taken_is_named(serve: Serve, store: str) -> None:
    address = serve().address
    command = [sys.executable, "-m", "emberline", "kv", "serve", "--store", store, "--listen", address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr == f"Error: Address already in use: {address}\n"


def test_the_command_line_tells_what_a_service_holds(serve: Serve) -> None:
    address = serve().address
    with emberkv.connect(address, PLAIN) as cache:
        keys = cache.keys(tokens(1, 4))
        cache.put(keys, [page(1)] * 4)
        cache.flush()
        cache.match(keys)
        said = emberline("kv", "stat", "--address", address).stdout
        assert PLAIN.name in said and "matches ended by whole 1" in said
        numbers = json.loads(emberline("kv", "stat", "--address", address, "--json").stdout)
        assert numbers["namespaces"][PLAIN.name]["pages"] == 4
        report = json.loads(emberline("kv", "erase", "default", "--address", address, "--json").stdout)
        assert report[PLAIN.name]["pages"] == 4
        assert "evicted_pages" in emberline("kv", "gc", PLAIN.name, "--address", address).stdout
        assert "may hold 1MiB" in emberline("kv", "quota", PLAIN.name, "default", "1MiB", "--address", address).stderr
        assert "room for" in emberline("kv", "quota", PLAIN.name, "default", "0", "--address", address).stderr
        assert "no namespace 'nobody'" in emberline("kv", "drop", "nobody", "--address", address, code=1).stderr


def test_an_operator_is_told_by_the_one_that_answers(serve: Serve) -> None:
    address = serve().address
    emberkv.connect(address, PLAIN).close()
    with Operator(f"127.0.0.1:1, {address}") as operator:
        assert list(operator.stat()["namespaces"]) == [PLAIN.name]
    assert PLAIN.name in emberline("kv", "ls", "--address", f"127.0.0.1:1,{address}").stdout
    with Operator("127.0.0.1:1,127.0.0.1:2") as operator, pytest.raises(Unreachable, match=":2: "):
        operator.stat()


def test_who_is_not_there_is_told_at_once_and_what_makes_no_sense_too(tmp_path: Path) -> None:
    trace = tmp_path / "t.jsonl"
    trace.write_text('{"timestamp": 0, "input_length": 5, "output_length": 1, "hash_ids": [1]}\n')
    for command in (("bench", "127.0.0.1:1"), ("replay", trace, "127.0.0.1:1")):
        assert "Connection refused" in emberline("kv", *command, code=1).stderr
    told = emberline("kv", "serve", "--store", f"ember://{tmp_path}/s", "--events-replay", "tcp://127.0.0.1:0", code=2)
    assert "give both" in told.stderr


def test_of_several_addresses_threads_find_the_one_that_serves(serve: Serve) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        dead = f"127.0.0.1:{nobody.getsockname()[1]}"  # Bound, and nobody listens.
        with emberkv.connect(f"{dead},{serve().address}", PLAIN, timeout_s=10) as cache:
            keys = cache.keys(tokens(1, 3))
            cache.put(keys, [page(1)] * 3, durable="committed")
            for threads in (1, 2, 4, 8):
                cache._caller.addresses = [dead, *(each for each in cache._caller.addresses if each != dead)]
                with ThreadPoolExecutor(threads) as pool:
                    hits = list(pool.map(lambda _: cache.match(keys).pages, range(threads)))
                assert hits == [3] * threads


def test_a_put_that_is_buffered_is_written_behind_the_callers_back(serve: Serve) -> None:
    with emberkv.connect(serve(256 * MIB).address, PLAIN) as cache:
        chains = [cache.keys(tokens(prompt, 8)) for prompt in range(1, 40)]
        for prompt, keys in enumerate(chains):
            assert cache.put(keys, [page(prompt, 100_000 + each) for each in range(8)]) == ["stored"] * 8
        cache.flush()
        for prompt, keys in enumerate(chains):
            assert cache.get(cache.match(keys)) == [page(prompt, 100_000 + each) for each in range(8)]
        large = cache.keys(tokens(99, 2))
        assert cache.put(large, [page(7, 3 * MIB)] * 2) == ["stored"] * 2


def test_what_a_service_lost_of_buffered_puts_is_told_by_flush(serve: Serve) -> None:
    service = serve()
    with emberkv.connect(service.address, PLAIN, timeout_s=3) as cache:
        keys = cache.keys(tokens(1, 2))
        cache.put(keys, [page(1)] * 2, durable="committed")
        with stopped(service.process.pid), pytest.raises(EmberError):
            cache.put(cache.keys(tokens(2, 2)), [page(1)] * 2)
            cache.flush()
        cache.flush()
        assert cache.match(keys).pages == 2


def test_a_cache_is_closed_twice_and_belongs_to_one_process(serve: Serve) -> None:
    cache = emberkv.connect(serve().address, PLAIN)
    keys = cache.keys(tokens(1, 1))
    cache.put(keys, [page(1)], durable="committed")
    hit = cache.match(keys)
    with pytest.raises(LimitExceeded):
        cache.get_into(hit, [bytearray(10)], begin=-1)
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        try:
            cache.match(keys)
        except StoreClosed as error:
            os.write(write, str(error).encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert b"after a fork" in os.read(read, 1000)
    (way,) = cache._caller._ways.values()
    while way.connection is None:
        cache.match(keys)
    if (child := os.fork()) == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(20)  # Who waits for a lock or a thread of the other process waits for ever.
        with cache._lock:
            cache.close()
        os._exit(17 if way.connection._sock.fileno() < 0 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 17
    assert cache.get(hit) == [page(1)] and cache.match(keys).pages == 1
    cache.close()
    cache.close()
    with pytest.raises(StoreClosed):
        cache.match(keys)


def test_a_standby_ends_when_it_is_told(serve: Serve, tmp_path: Path) -> None:
    emberkv.connect(serve().address, PLAIN).close()
    waiting = serve(listen=f"unix:{tmp_path}/standby")
    soon = time.monotonic() + 30
    while not (tmp_path / "standby").exists() and time.monotonic() < soon:
        time.sleep(0.01)
    waiting.end()
    assert waiting.process.returncode == 0
