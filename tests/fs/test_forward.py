"""The way between two neighbours of a chain."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from contextlib import suppress

from emberfs.errors import StaleRouting
from emberfs.messages import Done, Message, Vouch
from emberfs.portal import Portal
from emberfs.runtime import AsyncioRuntime
from emberfs.storage.forward import Link
from emberfs.testing.sim import SimRuntime, run
from emberfs.waiting import until


class Behind:
    """A successor that learns of the chain version only at the third message."""

    def __init__(self) -> None:
        self.taken: list[Message] = []
        self.refused = 0

    async def call(self, request: Message, buffers: Sequence[memoryview] = ()) -> Message:
        if self.refused < 2:
            self.refused += 1
            raise StaleRouting("chain version 10 is asked for, and 9 is known here")
        self.taken.append(request)
        return Done()


def test_a_vouch_reaches_a_successor_that_hears_of_the_chain_version_late() -> None:
    async def main(runtime: SimRuntime) -> None:
        successor = Behind()
        link = Link(runtime, successor, 1, version=10, changed=runtime.future())
        number = link.take_number()
        await link.vouch(number)
        assert successor.taken == [Vouch(1, 10, number, False)]

    run(0, main)


def test_a_call_that_failed_lets_go_of_what_it_sent() -> None:
    """At once, and not when garbage in circles is looked for: it may be large."""

    class Payload(bytearray):
        pass

    async def refuse(payload: Payload) -> None:
        raise StaleRouting("not now")

    async def main() -> None:
        payload = Payload(b"payload")
        watch = weakref.ref(payload)
        with suppress(StaleRouting):
            await until(runtime, refuse(payload), runtime.future(), name="refused")
        del payload
        assert watch() is None

    runtime = AsyncioRuntime()
    gc.disable()
    try:
        Portal(runtime).run(main())
    finally:
        gc.enable()
        runtime.stop()


def test_a_vouch_ends_with_its_chain_version() -> None:
    async def main(runtime: SimRuntime) -> None:
        changed = runtime.future()
        link = Link(runtime, Behind(), 1, version=10, changed=changed)
        number = link.take_number()
        changed.set_result(None)
        await link.vouch(number)

    run(0, main)
