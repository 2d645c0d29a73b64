"""The lease of a storage node: until when its targets may serve.

It runs from the moment a heartbeat was *sent*, so that it ends before the manager, which counts from the receipt, may
act. How long it is, the manager says each time: it waits for the longest that it gave. The clock is this node's
monotonic one.

Does not know: who renews it.
"""

from __future__ import annotations

from ..errors import StaleRouting
from ..runtime import Runtime


class Lease:
    """Not valid until it is renewed."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self.until_s = float("-inf")

    def renew(self, sent_s: float, lease_s: float) -> None:
        """The primary has answered a heartbeat that was sent at `sent_s`. An answer that was overtaken is fine."""
        self.until_s = max(self.until_s, sent_s + lease_s)

    @property
    def is_valid(self) -> bool:
        return self._runtime.now_s() < self.until_s

    def check(self) -> None:
        """Raises StaleRouting outside the lease."""
        if not self.is_valid:
            raise StaleRouting("this server has not reached the primary manager lately: it may have been replaced")
