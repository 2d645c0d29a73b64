"""Where a request parts from those before it, and so where states are worth keeping: the prefix tree says so itself.

A match that ends for want of states knows more of the chain than it can use. If what it knows goes on otherwise, the
last known page ends a common prefix: whoever keeps states there lets a third request begin behind it. That costs no
memory, survives a restart, and a hint that nobody heeds is given again.

Does not know: messages; what states are.
"""

from __future__ import annotations

from collections.abc import Sequence

from .table import PageTable


def parting(table: PageTable, tenant: int, keys: Sequence[bytes], pages: int) -> tuple[int, int]:
    """Of a chain whose first `pages` a reader can use: (how many are there, with what is needed of each; how many it
    has in common with others that go on otherwise, 0 if it parts nowhere, or where it can be used)."""
    needed = [places for places, last in zip(table.places, table.trailing, strict=True) if last is None]
    known, end = pages, None
    for key in keys[pages:]:
        slot = table.slot(tenant, key)
        if slot is None or not all(places["segment"][slot] for places in needed):
            break
        known, end = known + 1, slot
    if end is None or known == len(keys) or not table.children[end] or table.any_slot(tenant, keys[known]) is not None:
        return known, 0
    return known, known
