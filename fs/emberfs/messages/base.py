"""The base of all messages. A request is a struct plus a list of buffers handed beside it."""

from __future__ import annotations

import msgspec


class Message(msgspec.Struct, array_like=True, tag=True):
    """Base of all messages; the tag is the class name. Fields are added at the end with a default, never moved."""


class Done(Message):
    """It is done, durably."""
