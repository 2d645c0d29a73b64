"""The transport of one process: a call is a call. Buffers are passed as they are, so nothing is copied."""

from __future__ import annotations

from .types import Call, Service


class MemoryConnection:
    """A connection to a service of this process. `call` is the service's own coroutine function: no frame between."""

    __slots__ = ("call",)

    def __init__(self, service: Service) -> None:
        self.call: Call = service.handle
