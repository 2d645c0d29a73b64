"""The way to the primary manager, whichever it is now."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from ..errors import StaleRouting, Unavailable, UpdateUnknown
from ..messages import Message
from ..runtime import Runtime
from ..transport.types import Network

Reply = TypeVar("Reply", bound=Message)

RETRY_S = 0.1
"""Pause after all managers were tried in vain."""


class Managers:
    """Asks the managers in turn until the primary answers, and stays with it."""

    def __init__(self, runtime: Runtime, network: Network, addresses: Sequence[str]) -> None:
        assert addresses
        self._runtime = runtime
        self._network = network
        self._addresses = list(addresses)

    async def ask(self, request: Message, reply: type[Reply], *, timeout_s: float) -> Reply:
        """Put a question that may be put twice. Raises Unavailable after `timeout_s`, and what the primary raises."""
        deadline_s = self._runtime.now_s() + timeout_s
        tried = 0
        refused: StaleRouting | None = None
        while True:
            try:
                answer = await self._network.connection(self._addresses[0]).call(request)
            except (Unavailable, UpdateUnknown, StaleRouting) as error:
                # Not reached, or not the primary.
                tried += 1
                if isinstance(error, StaleRouting):
                    refused = error
                self._addresses.append(self._addresses.pop(0))
                if self._runtime.now_s() > deadline_s:
                    raise self._nobody(error, refused) from error
                if tried % len(self._addresses) == 0:
                    await self._runtime.sleep(RETRY_S)
                continue
            assert isinstance(answer, reply)
            return answer

    def _nobody(self, error: Exception, refused: StaleRouting | None) -> Unavailable:
        """One who lives knows better what is wrong than the silence of the others."""
        addresses = ", ".join(self._addresses)
        if refused is not None:
            is_elsewhere = " is at " in str(refused) and not any(each in str(refused) for each in self._addresses)
            hint = "; a URL should name all managers" if is_elsewhere else ""
            return Unavailable(f"no manager is the primary ({addresses}): {refused}{hint}")
        return Unavailable(f"no manager answered ({addresses}): {error}")
