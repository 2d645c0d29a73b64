"""A request to another server, and the stopwatch of whoever sends it.

Does not know: connections.
"""

from __future__ import annotations

from collections.abc import Awaitable, Sequence

from ..messages import Message
from ..runtime import Runtime
from ..stopwatch import Stopwatch
from .codec import kind_of


async def watched(
    watch: Stopwatch,
    runtime: Runtime,
    request: Message,
    buffers: Sequence[memoryview],
    call: Awaitable[Message],
) -> Message:
    """The reply of `call`; meanwhile `watch` knows that a server is waited for."""
    if watch.sent is None:
        watch.begin_servers()
        try:
            return await call
        finally:
            watch.end_servers()
    error = ""
    began_s = runtime.now_s()
    watch.begin_servers()
    try:
        return await call
    except BaseException as raised:
        error = type(raised).__name__
        raise
    finally:
        watch.end_servers()
        watch.sent.record(
            kind_of(request),
            whole_s=runtime.now_s() - began_s,
            payload_bytes=sum(map(len, buffers)),
            error=error,
        )
