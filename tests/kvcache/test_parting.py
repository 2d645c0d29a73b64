"""Where requests part, as the service sees it, and what states that are kept there make hit.

Run: pytest tests/kvcache/test_parting.py
"""

from __future__ import annotations

from collections.abc import Callable

import emberkv
from emberkv.keys import ROOT
from emberkv.page import Place
from emberkv.parting import parting
from emberkv.simulate import simulate_units
from emberkv.table import PageTable
from emberkv.units import UnitRule

from tests.fs.cli_run import emberline
from tests.kvcache.serving import Server
from tests.kvcache.traces import conversations

NAMESPACE = emberkv.Namespace(
    model="v4", dtype="fp8", layout="csa", page_tokens=4,
    kinds=(emberkv.Kind("kv"), emberkv.Kind("window", policy="trailing:1"), emberkv.Kind("indexer")),
)  # fmt: skip
KV, WINDOW, INDEXER = range(3)


def key(name: str) -> bytes:
    return name.encode().ljust(32, b".")


class Tree:
    """A table of one tenant. A chain is a word: each letter is a page, named by the letters up to it."""

    def __init__(self) -> None:
        self.table = PageTable([kind.trailing for kind in NAMESPACE.kinds])
        self.table.add_tenant()

    def put(self, word: str, *kinds: int, begin: int = 0) -> None:
        for end in range(begin + 1, len(word) + 1):
            above = key(word[: end - 1]) if end > 1 else ROOT
            for kind in kinds:
                self.table.put(0, key(word[:end]), above, kind, Place(1, 0, 10, 0), now_s=1.0)

    def parting(self, word: str) -> tuple[int, int, int]:
        keys = [key(word[:end]) for end in range(1, len(word) + 1)]
        pages = len(self.table.match(0, b"".join(keys)).slots)
        return pages, *parting(self.table, 0, keys, pages)


def test_a_request_parts_where_another_one_went_on_otherwise() -> None:
    tree = Tree()
    assert tree.parting("abcx") == (0, 0, 0)
    tree.put("abcde", KV, INDEXER)
    assert tree.parting("abcx") == (0, 3, 3)
    assert tree.parting("abcdef") == (0, 5, 0), "it goes on from the other's end, where that one's states are gone"
    assert tree.parting("abc") == (0, 3, 0), "it has an end of its own there"
    assert tree.parting("abcde") == (0, 5, 0)
    assert tree.parting("xyz") == (0, 0, 0)
    tree.put("ab", WINDOW, begin=1)
    assert tree.parting("abcx") == (2, 3, 3)
    assert tree.parting("abx") == (2, 2, 0), "there are states"
    tree.put("abc", WINDOW, begin=2)
    assert tree.parting("abcx") == (3, 3, 0)


def test_what_is_damaged_is_no_parting() -> None:
    tree = Tree()
    tree.put("abcde", KV, INDEXER)
    slot = tree.table.slot(0, key("abcd"))
    assert slot is not None
    tree.table.unplace(slot, INDEXER)
    assert tree.parting("abcde") == (0, 3, 0)
    tree.put("xyz", KV, INDEXER, begin=1)
    assert tree.parting("xyz") == (0, 0, 0), "orphans are not there"


def test_the_service_tells_the_second_request_what_lets_the_third_hit(serve: Callable[..., Server]) -> None:
    """A+B, then A+C, then A+D."""
    rule = UnitRule(page_tokens=4, interval_tokens=None)
    address = serve().address
    with emberkv.connect(address, NAMESPACE) as cache:

        def request(last: int) -> tuple[int, int, list[int]]:
            """Computes what it cannot take. (pages it took, where it was told that it parts, what it kept states of)"""
            tokens = [*range(12), *[100 * last + each for each in range(8)]]
            keys = cache.keys(tokens)
            hit = cache.match(keys)
            plan = rule.plan_of(hit.known_pages, hit.pages, parts_at=hit.parts_at)
            kept = rule.states([len(tokens)], plan=plan)
            for kind in ("kv", "indexer"):
                cache.put(keys, [b"x" * 100] * len(keys), kind=kind)
            for page in kept:
                cache.put(keys[page : page + 1], [b"w" * 50], parent=keys[page - 1], kind="window")
            cache.flush()
            return hit.pages, hit.parts_at, kept

        assert request(1) == (0, 0, [4])
        assert request(2) == (0, 3, [2, 4])
        assert request(3) == (3, 0, [4])
        assert request(3)[0] == 5
        one, two = cache.match_many([cache.keys(range(12)), cache.keys([*range(8), 9, 9, 9, 9])])
        assert (one.pages, one.known_pages, one.parts_at) == (3, 3, 0)
        assert (two.pages, two.known_pages, two.parts_at) == (0, 2, 2)
        assert cache.stat()["namespaces"][NAMESPACE.name]["counts"]["partings"] == 2
        asked = " ".join(map(str, [*range(8), 9, 9, 9, 9])).encode()
        said = emberline("kv", "match", "-", "--address", address, stdin=asked, code=1).stdout
        assert "2 pages are there, and no states to go on from; there it parts from another one" in said


def test_on_conversations_the_service_sees_what_the_rule_counts() -> None:
    """The trace through a table of the service: states at ends, every 8,192 tokens, and where it says."""
    trace, rule = conversations(), UnitRule(page_tokens=512)
    table = PageTable([None, 1])
    table.add_tenant()
    hits = states = 0
    for request in trace.requests:
        pages = request.pages[: request.whole_pages(512)]
        keys = [(page + 1).to_bytes(32) for page in pages]
        taken = len(table.match(0, b"".join(keys)).slots)
        known, parts_at = parting(table, 0, keys, taken)
        hits += taken
        kept = set(rule.states([request.input_tokens], plan=rule.plan_of(known, taken, parts_at=parts_at)))
        for number, (key, above) in enumerate(zip(keys, [ROOT, *keys], strict=False)):
            for kind in (0, 1) if number in kept else (0,):
                slot = table.slot(0, key)
                if slot is None or table.place(slot, kind) is None:
                    table.put(0, key, above, kind, Place(1, 0, 1, 0), now_s=1.0)
                    states += kind
    found = simulate_units(trace, rule)
    assert (hits, states) == (found.unit_hits, found.states)
    assert (found.states, f"{found.unit_rate:.2%}") == (18_151, "35.87%")
