"""The base of all messages. A request is a struct plus a list of buffers handed beside it."""

from __future__ import annotations

from typing import ClassVar

import msgspec

from ..routing import Node, Role

SERVERS = frozenset[str](Role)
OPERATORS = SERVERS | {"admin"}
EVERYBODY = OPERATORS | {"client"}
READER = "reader"
"""Reads under grants, and nothing else: see `emberfs.grants`."""
WRITER = "writer"
"""A reader that also writes under grants."""
GRANTED = frozenset((READER, WRITER))
READERS = EVERYBODY | GRANTED
WRITERS = EVERYBODY | {WRITER}
"""Roles that a certificate may give, in sets of those who may send the same."""


class Message(msgspec.Struct, array_like=True, tag=True):
    """Base of all messages; the tag is the class name. Fields are added at the end with a default, never moved."""

    changes_nothing: ClassVar[bool] = False
    """A request that may be lost, stopped half-way or sent twice, and nobody is the wiser."""
    may_send: ClassVar[frozenset[str]] = SERVERS
    """The roles that it is taken from, where peers have certificates."""
    takes_turns: ClassVar[bool] = False
    """A request for data. A server that has much to do lets it wait for those of others, or refuses it."""
    fills_buffers: ClassVar[bool] = False
    """The buffers of this request are destinations. Its reply says in `counts` how many bytes of each it filled."""

    @property
    def speaks_as(self) -> Node | None:
        """The node that the sender says it is: its certificate must name it, and be of its role."""
        return None


class Done(Message):
    """It is done, durably."""
