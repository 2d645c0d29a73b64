"""Fills an index with pages that nobody wrote. Runs in a process of its own and prints one JSON object.

python -m benchmarks.kvcache.table_probe PAGES
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
import time

from emberkv.keys import ROOT
from emberkv.page import Place
from emberkv.table import PageTable

from ..memory_probe import rss_anon_bytes
from ..runner import verify

CHAIN_PAGES = 128
MATCHES = 5000
PAGES_PER_SEGMENT = 1000


def probe(pages: int) -> dict[str, float]:
    """Fill a table with chains of 128 pages, and look some of them up."""
    before = rss_anon_bytes()
    table = PageTable([None])
    tenant = table.add_tenant()
    for chain in range(pages // CHAIN_PAGES):
        parent = ROOT
        for at, key in enumerate(_chain(chain)):
            number = chain * CHAIN_PAGES + at
            segment, index = divmod(number, PAGES_PER_SEGMENT)
            place = Place(segment + 1, index * 57440, 57344, number)
            table.put(tenant, key, parent, 0, place, now_s=float(number))
            parent = key
    page_bytes = (rss_anon_bytes() - before) / table.count
    rng, spent = random.Random(1), []
    for _ in range(MATCHES):
        keys = b"".join(_chain(rng.randrange(pages // CHAIN_PAGES)))
        begin_s = time.perf_counter()
        found = table.match(tenant, keys)
        spent.append(time.perf_counter() - begin_s)
        verify(len(found.slots) == CHAIN_PAGES, "the table lost a page")
    spent.sort()
    return {
        "page_bytes": page_bytes,
        "median_us": spent[len(spent) // 2] * 1e6,
        "p99_us": spent[len(spent) * 99 // 100] * 1e6,
    }


def _chain(number: int) -> list[bytes]:
    return [hashlib.sha256(b"%d" % (number * CHAIN_PAGES + at)).digest() for at in range(CHAIN_PAGES)]


if __name__ == "__main__":
    print(json.dumps(probe(int(sys.argv[1]))))
