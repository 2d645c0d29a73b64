"""What services beside the store say over its transport: the store carries it and does not read it."""

from __future__ import annotations

from .base import READERS, Message


class Foreign(Message):
    """A request, or a reply, of a service that is not the store's. Who is on both ends knows what `body` is.

    It counts as one that changes nothing: such a service makes its requests so that one may be lost or come twice.
    """

    may_send = READERS
    changes_nothing = True

    body: bytes
