"""`Operator`: what an operator asks of a KV-cache service: numbers, quotas, and taking away what nobody needs."""

from __future__ import annotations

import contextlib
import json
from types import TracebackType
from typing import Any

from emberfs.errors import Unavailable
from emberfs.portal import Portal
from emberfs.runtime import AsyncioRuntime
from emberfs.transport import TcpConfig, TcpNetwork

from . import messages
from .messages import A


class Operator:
    """A service, as its operator sees it: the first of several addresses, with commas, that answers. Every call raises
    AccessDenied, NotFound, Unreachable, Unanswered."""

    def __init__(self, address: str, *, token: str = "", tcp: TcpConfig | None = None, timeout_s: float = 30.0) -> None:
        self._addresses = [each.strip() for each in address.split(",") if each.strip()] or [address]
        self._token, self._timeout_s = token, timeout_s
        self._runtime = AsyncioRuntime("emberkv-operator")
        self._portal = Portal(self._runtime)
        self._network = TcpNetwork(self._runtime, tcp or TcpConfig())

    def stat(self, *, tenant: str = "") -> dict[str, Any]:
        """Figures of every open namespace; with a token of `tenant` only, what is its own of them."""
        return self._numbers(messages.Stat(self._token, tenant))

    def collect(self, namespace: str) -> dict[str, Any]:
        """Give back what is dead now. What was done for room since the start."""
        return self._numbers(messages.Collect(namespace, self._token))

    def erase(self, tenant: str, *, namespace: str = "") -> dict[str, Any]:
        """Take out all that a tenant has, in one namespace or in all. What it had, by namespace.

        Raises Unavailable, and takes nothing out, if one of them is not open there.
        """
        return self._numbers(messages.Erase(tenant, self._token, namespace))

    def drop(self, namespace: str) -> dict[str, Any]:
        """Take out all pages of a namespace. What there was, by tenant."""
        return self._numbers(messages.Drop(namespace, self._token))

    def set_quota(self, namespace: str, tenant: str, limit_bytes: int) -> None:
        """What a tenant may hold; 0: as much as there is."""
        self._ask(messages.Quota(namespace, tenant, limit_bytes, self._token), messages.Okay)

    def set_ttl(self, namespace: str, ttl_s: float, *, tenant: str = "") -> None:
        """After how long pages go that nobody used: a tenant's, or those of all others; 0: as it was."""
        self._ask(messages.Ttl(namespace, tenant, ttl_s, self._token), messages.Okay)

    def close(self) -> None:
        """End the connection."""
        self._portal.drain()
        try:
            self._portal.run_last(self._network.close())
        finally:
            self._runtime.stop()

    def __enter__(self) -> Operator:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def _numbers(self, ask: messages.Ask) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self._ask(ask, messages.Numbers).json)
        return found

    def _ask(self, ask: messages.Ask, answer: type[A]) -> A:
        for address in self._addresses[:-1]:
            with contextlib.suppress(Unavailable):
                return self._send(address, ask, answer)
        return self._send(self._addresses[-1], ask, answer)

    def _send(self, address: str, ask: messages.Ask, answer: type[A]) -> A:
        call = self._network.connection(address).call
        return self._portal.run(messages.send(call, ask, answer, timeout_s=self._timeout_s))
