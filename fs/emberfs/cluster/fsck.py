"""fsck of a running cluster: do names, inodes and chunks agree? Nobody is stopped, and nothing is changed.

The checks are those of an embedded store, on rows that are read while they change: what is just being done looks like
damage. So a finding counts only if it is found again, word for word, at each of a few looks with a pause in between. A
request that waits all that time, for the kv server say, may still look like damage: whoever doubts looks again.

Does not know: whether bytes are right (the scrub), and what storage nodes keep inside of their disks.
"""

from __future__ import annotations

from collections.abc import Callable

from ..kv.types import KV
from ..meta.check import Finding, check
from ..meta.chunks import ClientChunkOps
from ..meta.lengths import check_lengths
from ..runtime import Runtime

LOOKS = 3
PAUSE_S = 2.0
"""Longer than a request takes that nothing holds up; one that is held up may take the 30 s that calls wait."""


async def fsck(
    kv: KV, chunks: ClientChunkOps, runtime: Runtime, *, say: Callable[[str], object] = lambda _: None
) -> list[Finding]:
    """What is wrong, and stays so. `say` is told what is being done."""
    found = await _look(kv, chunks)
    for _ in range(LOOKS - 1):
        if not found:
            break
        say(f"looking again, whether {len(found)} findings stay")
        await runtime.sleep(PAUSE_S)
        again = set(await _look(kv, chunks))
        found = [finding for finding in found if finding in again]
    return found


async def _look(kv: KV, chunks: ClientChunkOps) -> list[Finding]:
    return [*await check(kv, chunks), *await check_lengths(kv, chunks)]
