"""How much new data a disk takes that spreads evenly over its targets.

Does not know: chains, or replicas.
"""

from __future__ import annotations

from collections.abc import Sequence


def room_per_target(free_bytes: int, idle_bytes: Sequence[int]) -> int:
    """What each target of a disk may take: the space of its own free blocks first, then what the disk has left, which
    they share. The one that has least is full first."""
    level, left = 0, free_bytes
    for count, idle in enumerate(sorted(idle_bytes)):
        if count * (idle - level) > left:
            break
        left -= count * (idle - level)
        level = idle
    else:
        count = len(idle_bytes)
    return level + left // count if count else level
