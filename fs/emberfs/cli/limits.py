"""What limits an operation: the part that takes most of its time, named by what would have to be faster.

    disk     the medium, or the flushes: files are read that are not in memory, written, or synced
    crc      checksums
    copy     bytes are moved in memory, out of the page cache for one
    cpu      everything else that is computed, and waiting for the processor
    network  bytes are on their way between processes
    latency  the same for so few bytes that it is the number of round trips, and not how much there is to carry

Time is split by what client and servers measured (`attribution`). Checksums and copies are no stages of theirs: of
these it is known how many bytes there were, and what the machine took for as many in the same run.

Does not know: how anything was measured.
"""

from __future__ import annotations

from .attribution import Shares
from .ceilings import Ceilings

CACHED_FACTOR = 5
"""A plain read that takes no longer than so many copies of its bytes came from memory, not from the medium."""
CALL_S = 10e-6
"""For a system call, beside what it copies."""
CARRIED_PART = 0.5
"""Of the time on the network: if a socket takes at least this part of it for the bytes, it is they that count."""


def parts_of(
    shares: Shares, ceilings: Ceilings, *, plain_s: float, pieces: int, reads: bool, has_servers: bool
) -> dict[str, float]:
    """What the parts of one operation take, in seconds; they add up to `shares`. `plain_s`: the system calls alone."""
    disk_s, compute_s = shares.disk, shares.client + shares.queue + shares.work
    copy_s = 0.0
    if reads:
        # Read bytes are checked as they land, which the disk's time includes.
        crc_s = min(ceilings.crc_s, disk_s)
        disk_s -= crc_s
        if plain_s <= CACHED_FACTOR * ceilings.copy_s + pieces * CALL_S:
            copy_s, disk_s = disk_s, 0.0
    else:
        crc_s = min(ceilings.crc_s, compute_s)
        compute_s -= crc_s
    if has_servers:
        # At least once more, into the caller's memory or out of it.
        moved_s = min(ceilings.copy_s, compute_s)
        copy_s, compute_s = copy_s + moved_s, compute_s - moved_s
    carried = ceilings.copy_s > 0 and ceilings.socket_s >= CARRIED_PART * shares.network
    parts = {"disk": disk_s, "crc": crc_s, "copy": copy_s, "cpu": compute_s}
    return parts | {"network" if carried else "latency": shares.network}


def limit_of(parts: dict[str, float]) -> str:
    """The largest of `parts`."""
    return max(parts, key=lambda name: parts[name])
