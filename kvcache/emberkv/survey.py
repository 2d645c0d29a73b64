"""Looks at all pages of a table at once, by columns: some 50 ms a million pages each. Nothing that a request waits for.

Does not know: what it is for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Set

import numpy as np

from .page import HEADER_BYTES
from .table import PageTable


def hollow(table: PageTable) -> list[int]:
    """Slots that have no page of any kind."""
    slots = table.slots()
    found: list[int] = slots[~np.any([places["segment"][slots] != 0 for places in table.places], axis=0)].tolist()
    return found


def oldest_stamps(table: PageTable, share: float) -> float:
    """The stamp that so large a share of the slots have not passed."""
    used_s = np.asarray(table.used_s)[table.slots()]
    return float(np.quantile(used_s, share)) if len(used_s) else 0.0


def bytes_by_segment(table: PageTable, since_s: float, now_s: float, kept: Set[int]) -> dict[int, int]:
    """Of each segment the bytes of pages that were used since then, or are pinned, or in slots that are `kept`."""
    stays = (np.asarray(table.used_s) >= since_s) | (np.asarray(table.pinned_s) > now_s)
    stays[list(kept)] = True
    found: Counter[int] = Counter()
    for places in table.places:
        there = places[: len(stays)][stays]
        sizes = np.where(there["segment"] != 0, there["length"].astype(np.float64) + HEADER_BYTES, 0)
        sums = np.bincount(there["segment"], weights=sizes)
        found.update({int(segment): int(sums[segment]) for segment in np.flatnonzero(sums)})
    return found
