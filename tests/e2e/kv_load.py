"""A process that puts load on a KV cache and checks every byte: `kv_load.py ADDRESSES SEED`.

It goes on until its standard input ends and it has done enough, then prints what it saw as one JSON object. What a
page holds follows from its key, so whoever reads it knows whether it is right, and prompts share prefixes, so that
processes meet on the same keys.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import sys
import threading
import time
from collections import Counter

import emberkv
from emberfs.errors import EmberError

NAMESPACE = emberkv.Namespace(model="faults", dtype="bf16", layout="mla", page_tokens=4, kinds=(emberkv.Kind("kv"),))
PROMPTS = 60
PAGES = 16
PAGE_BYTES = (4_000, 60_000)
READ_MIN, STORED_MIN = 50, 5
"""Pages that are enough."""
MORE_S = 240.0
"""For so long it goes on at most to have them."""


def tokens(prompt: int) -> list[int]:
    """Of a prompt: three of them begin alike."""
    return [prompt // 3] * (NAMESPACE.page_tokens * PAGES // 2) + [prompt] * (NAMESPACE.page_tokens * PAGES // 2)


def page(key: bytes) -> bytes:
    """The page of a key."""
    size = PAGE_BYTES[0] + int.from_bytes(key[:4]) % (PAGE_BYTES[1] - PAGE_BYTES[0])
    piece = b"".join(hashlib.sha256(key + bytes([each])).digest() for each in range(64))
    return (piece * (size // len(piece) + 1))[:size]


def visit(cache: emberkv.KVCache, rng: random.Random, seen: Counter[str], wrong: list[str]) -> None:
    """One request of an engine: what is there is read and checked, the rest is put."""
    keys = cache.keys(tokens(rng.randrange(PROMPTS)))[: rng.randrange(1, PAGES + 1)]
    hit = cache.match(keys, lease_s=rng.choice([0.0, 0.05, 5.0]))
    if rng.random() < 0.1:
        time.sleep(rng.random() / 2)  # The lease may end meanwhile, and the page go.
    good = 0
    for key, data in zip(keys, cache.get(hit), strict=False):
        if data is None:
            seen["lost"] += 1
            break
        good += 1
        if data != page(key):
            wrong.append(f"{key.hex()}: {len(data)} bytes, {data[:16].hex()}")
    seen["read"] += good
    if rng.random() < 0.5:
        cache.release(hit)
    parent = keys[good - 1] if good else None
    durable = rng.choice(["buffered", "buffered", "committed"])
    seen.update(cache.put(keys[good:], [page(key) for key in keys[good:]], parent=parent, durable=durable))


def main(addresses: str, seed: int) -> None:
    """Until standard input ends, and then until enough was read and stored, however slow the machine is."""
    rng, seen, wrong = random.Random(seed), Counter[str](), list[str]()
    ends = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), ends.set()), daemon=True).start()
    end_s, read_before_end = math.inf, 0
    with emberkv.connect(addresses, NAMESPACE, timeout_s=20) as cache:
        while time.monotonic() < end_s:
            try:
                visit(cache, rng, seen, wrong)
            except EmberError as error:
                seen[type(error).__name__] += 1
            if not ends.is_set():
                read_before_end = seen["read"]
            else:
                has_enough = seen["read"] >= READ_MIN and seen["stored"] >= STORED_MIN
                end_s = 0.0 if has_enough else min(end_s, time.monotonic() + MORE_S)
    json.dump({"seen": seen, "read_before_end": read_before_end, "wrong": wrong}, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
