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


def oldest_stamps(table: PageTable, share: float, *, within: Set[int] | None = None) -> float:
    """The stamp that so large a share of the slots have not passed: of all, or of those that lie in some segments."""
    slots = table.slots()
    if within is not None:
        some = list(within)
        slots = slots[np.any([np.isin(places["segment"][slots], some) for places in table.places], axis=0)]
    used_s = np.asarray(table.used_s)[slots]
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


def newest_by_segment(table: PageTable) -> dict[int, float]:
    """Of each segment with pages the newest stamp of one."""
    found: dict[int, float] = {}
    used_s = np.asarray(table.used_s)
    for places in table.places:
        segments = places["segment"][: len(used_s)]
        newest = np.full(int(segments.max(initial=0)) + 1, -np.inf)
        np.maximum.at(newest, segments, used_s)
        for segment in np.flatnonzero(newest > -np.inf).tolist():
            found[segment] = max(found.get(segment, -np.inf), float(newest[segment]))
    found.pop(0, None)
    return found


def segments_of(table: PageTable, slots: Set[int]) -> set[int]:
    """Those in which their pages lie."""
    some = list(slots)
    return {int(each) for places in table.places for each in np.unique(places["segment"][some])} if some else set()


def pinned(table: PageTable, now_s: float) -> set[int]:
    """Slots that are."""
    return set(np.flatnonzero(np.asarray(table.pinned_s) > now_s).tolist())
